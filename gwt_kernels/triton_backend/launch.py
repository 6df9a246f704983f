"""Launches of the step's kernels for a bucket of tensors: what each call sends, and what stays between calls."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Generator, Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.compiler import CompiledKernel

from gwt_kernels.hyper import Begun, Hyper, Rounding, Rule, Span, quantum
from gwt_kernels.triton_backend.compiling import UNFUSED
from gwt_kernels.triton_backend.control_launch import rows as rows_on_device
from gwt_kernels.triton_backend.layout import alignment, block_layout, check_row, is_flat, variant
from gwt_kernels.triton_backend.norms import limiter_kernel, observe_kernel, sum_kernel
from gwt_kernels.triton_backend.step import norm_kernel, step_kernel
from gwt_kernels.triton_backend.tables import (
    TRITON_DTYPES,
    Sender,
    addresses,
    constant_rows,
    device_guard,
    lr_addresses,
    offs_of,
    scalar_rows,
)
from gwt_kernels.trust import check_bucket, check_lows, check_scales

__all__ = ["Launch", "gwt_adamw_", "update_sums"]

MAX_CHUNKS = 8192  # partial norms per launch, or a few more: the limiter's memory does not grow with the model
LIMITER_BLOCK = 1024
OBSERVE_BLOCK = 1024

_DTYPE = attrgetter("dtype")
_NULL = bytes(8)

Run = Generator[Tensor, tuple[Tensor | None, Tensor | None], None]
"""The launches of a step; it waits, where others have a say, for what is decided and for the limiter's divisors."""


def gwt_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    limiter_norms: Sequence[Tensor | None],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    *,
    level: int,
    rule: Rule,
    rounding: Rounding,
    keys: Sequence[int],
    lows: Sequence[Tensor | None],
    scales: Sequence[tuple[Tensor, Tensor] | None],
    workspace: dict[str, Any],
    control: Tensor | None = None,
    telemetry: Tensor | None = None,
    spans: Sequence[tuple[Span, Span]] | None = None,
    limits: Tensor | None = None,
    same_tensors: bool = False,
    looks: bool = False,
    sums: Tensor | None = None,
) -> Begun | None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked. Where ``sums`` are given, they
    receive what :func:`gwt_kernels.functional.update_sums` tells, and the step has begun.

    Tensors that the flat path can take share one launch per pass, the others a second one. A parameter that is
    not contiguous is updated in a contiguous copy, which is then copied back; a gradient is only copied.

    What lies in ``workspace`` serves as long as the parameters are the same objects, and all addresses but the
    gradients' stay; of those, sizes, dtype and alignment must. ``same_tensors`` promises it.
    """
    limited = level > 0 and limiter_norms[0] is not None
    split, quantized = rounding == "split", exp_avgs[0].dtype == torch.int8
    random = rounding == "stochastic" or quantized or exp_avgs[0].dtype == torch.bfloat16
    owned: list[Sequence[Any]] = [
        params,
        exp_avgs,
        exp_avg_sqs,
        limiter_norms if limited else (),
        lows if split else (),
    ]
    owned += zip(*scales, strict=True) if quantized else [(), ()]
    checked = "places" in workspace
    known = same_tensors and checked
    places = workspace["places"] if known else list(map(addresses, owned))
    if not known:
        workspace["kinds"], before = _Kinds.of(params, grads), workspace.get("kinds")
        known = checked and workspace["kinds"] == before and _same(params, workspace["params"])
    kinds: _Kinds = workspace["kinds"]
    packed = params if kinds.packed else [p.contiguous() for p in params]
    if not kinds.plain:
        grads = [g.resolve_neg().contiguous() for g in grads]
    given = addresses(grads)
    if _NULL in given and grads[0].device.type != "meta":  # whose launches are recorded, and read from nowhere
        _check_memory(grads, given)
    offs = offs_of(given)
    counted = steps.data_ptr() if isinstance(steps, Tensor) else 0
    options = (level, limited, rounding, keys if random else (), bool(counted), offs)
    # The addresses of copies are those of this step alone.
    if not (known and kinds.packed and workspace["places"] == places and workspace["options"] == options):
        workspace.pop("places", None)
        check_bucket([packed, grads, *owned[1:4]] if limited else [packed, grads, *owned[1:3]], level)
        for p in packed:
            check_row(p.shape[-1] if p.dim() else 1, level)
        if split:
            check_lows(packed, owned[4])
        if quantized:
            check_scales(exp_avgs, owned[5:], level)
        absent = bytes(8 * len(params))
        first, m, v, norm, low, *scale = [column or absent for column in places]
        first = first if kinds.packed else addresses(packed)
        misaligned = [any(offs) for offs in zip(*map(offs_of, (first, given, m, v, low)), strict=True)]
        fixed = [first, m, v, *([norm] if limited else [])]
        if random or split or counted:
            fixed = [first, m, v, norm, array("q", keys).tobytes(), low, *scale]
        plan = (level, quantized, params[0].device, list(map(Tensor.size, packed)), misaligned)
        if plan != workspace.get("plan"):
            workspace["launches"] = _plan(packed, misaligned, level, quantized)
            workspace["empty"] = [i for i, p in enumerate(packed) if not p.numel()]
        for launch in workspace["launches"]:
            launch.aim(fixed)
        workspace.update(plan=plan, places=places, params=list(params), options=options)
    moving: list[Any] = []
    if isinstance(steps, Tensor):
        rows, counts = constant_rows(hypers, level), [0] * len(params)  # rows_kernel writes the counts
        moving = [range(counted, counted + 8 * len(params), 8), lr_addresses(hypers)]
        empty = [steps[i] for i in workspace["empty"]]  # in no launch
        if not looks:
            _count(empty, control)
    else:
        rows, counts = scalar_rows(hypers, steps, level), list(steps) if random else []
    # A random bit's index is that of the whole tensor.
    whole = [[*a, *b] for a, b in spans] if spans is not None and random else []
    q = quantum(level) if quantized else 0
    dtypes = [TRITON_DTYPES[x[0].dtype] for x in (packed, grads, exp_avgs)]
    observed = [] if telemetry is None else [telemetry.data_ptr() + 48 * i for i in range(len(params))]
    with device_guard(params[0].device):
        runs = [
            launch.run(
                given, counts, moving, whole, rows, control, observed, dtypes, limits, sums, looks,
                LIMITED=limited or limits is not None or sums is not None, FOLDED=rule == "foam",
                ROUNDING=rounding, Q=q,
            )
            for launch in workspace["launches"]
        ]  # fmt: skip
        seen = [found for run in runs if (found := next(run, None)) is not None]
    if sums is None and not looks:
        _conclude(params, packed)
        return None
    rest = _Rest(runs, params, packed, grads, empty if looks else [])
    return Begun(seen if looks else [], rest.finish, params[0].new_empty(0) if sums is None else sums)


class _Rest(NamedTuple):
    """What is left of a step that waits for what its first pass leads to."""

    runs: list[Run]
    params: Sequence[Tensor]
    packed: Sequence[Tensor]
    sent: Sequence[Tensor]
    """The gradients, or copies of them, whose addresses were sent."""
    uncounted: list[Tensor]
    """Step counts of empty tensors."""

    @torch.no_grad()
    def finish(self, control: Tensor | None, limits: Tensor | None) -> None:
        """See :class:`gwt_kernels.functional.Begun`."""
        with device_guard(self.params[0].device):
            for run in self.runs:
                with contextlib.suppress(StopIteration):
                    run.send((control, limits))
        _count(self.uncounted, control)
        _conclude(self.params, self.packed)


def _check_memory(grads: Sequence[Tensor], words: bytes) -> None:
    """Raise if the memory of a gradient was freed, so that a kernel would read from nowhere."""
    for i, g in enumerate(grads):
        if words[8 * i : 8 * i + 8] == _NULL and g.numel():
            raise ValueError(
                f"a gradient of shape {tuple(g.shape)} has no memory: it was freed, so bring it back before the "
                f"step"
            )


def _count(steps: Sequence[Tensor], control: Tensor | None) -> None:
    for step in steps:
        step.add_(1.0 if control is None else control[1])


def _conclude(params: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    increment_version(params)  # for autograd, which else knows of no change
    if packed is not params:
        for p, x in zip(params, packed, strict=True):
            if x is not p:
                p.copy_(x)


def update_sums(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int] | Tensor,
    hypers: Sequence[Hyper],
    *,
    level: int,
    scales: Sequence[tuple[Tensor, Tensor] | None],
    control: Tensor | None,
    workspace: dict[str, Any],
    rounding: Rounding = "nearest",
    keys: Sequence[int] | None = None,
    lows: Sequence[Tensor | None] | None = None,
    spans: Sequence[tuple[Span, Span]] | None = None,
    same_tensors: bool = False,
    looks: bool = False,
) -> Begun:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    n = len(params)
    begun = gwt_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [None] * n,
        steps,
        hypers,
        level=level,
        rule="gwt",
        rounding=rounding,
        keys=[0] * n if keys is None else keys,
        lows=[None] * n if lows is None else lows,
        scales=scales,
        control=control,
        spans=spans,
        workspace=workspace,
        same_tensors=same_tensors,
        looks=looks,
        sums=torch.zeros(n, dtype=torch.float32, device=params[0].device),
    )
    assert begun is not None  # as there are sums
    return begun


class Launch:
    """Tensors of one bucket and one path: what stays the same from step to step."""

    def __init__(
        self, params: Sequence[Tensor], chosen: list[int], level: int, flat: bool, quantized: bool
    ) -> None:
        self.chosen = chosen if len(chosen) < len(params) else None  # None: all of them, in order
        self.n = len(chosen)
        self.level = level
        self.flat = flat
        self.variant = variant(level, flat, quantized)
        self.tile_blocks = self.variant["NB"]
        self.sender = Sender()
        self.kernels: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        device = params[0].device
        layout = [block_layout(params[i], 2**level) for i in chosen]
        tiles = [-(-n_blocks // self.tile_blocks) for n_blocks, _, _ in layout]
        first_tiles = [0, *accumulate(tiles)]
        self.n_tiles = first_tiles[-1]
        columns = chain(first_tiles[:-1], *zip(*layout, strict=True))
        self.layout = self.sender.send(array("q", columns).tobytes(), device)
        # Chunks: runs of tiles of one tensor, whose partial norms the limiter adds up.
        self.tiles_per_chunk = -(-self.n_tiles // MAX_CHUNKS)
        first_chunks = [0, *accumulate(-(-t // self.tiles_per_chunk) for t in tiles)]
        self.n_chunks = first_chunks[-1]
        self.first_chunks = self.sender.send(array("q", first_chunks).tobytes(), device)
        indices = array("q", self.chosen or ()).tobytes()
        self.index = self.sender.send(indices, device) if indices else None

    def aim(self, columns: list[bytes]) -> None:
        """Take the columns of the pointers' table that stay from step to step: all but gradients and step."""
        p, *others = map(self._own_words, columns)
        self.before_grads, self.after_grads = p, b"".join(others)

    def run(
        self,
        grad_words: bytes,
        counts: list[int],
        moving: list[Any],
        spans: list[list[int]],
        rows: list[bytes],
        control: Tensor | None,
        observed: list[int],
        dtypes: list[tl.dtype],
        limits: Tensor | None,
        squares: Tensor | None,
        looks: bool,
        **options: bool | str | int,
    ) -> Run:
        """Send the tables, then launch one kernel per pass; nothing here waits for the device.

        Where ``squares`` are given, they receive the sums of the tensors' updates. With these, and where it
        ``looks`` at the gradients, the run waits after its first pass, when it has changed nothing yet: it yields
        what ``norm_kernel`` saw of them, and goes on when it is sent what was decided and the limiter's divisors.

        ``moving`` are the addresses of step counts and learning rates that only the device knows: ``rows`` are then
        the constants from which a kernel makes the numbers of this step. ``observed`` are telemetry's rows.
        """
        device = self.layout.device
        table = self.before_grads + self._own_words(grad_words) + self.after_grads
        table += array("q", self._own(counts)).tobytes() if counts else b""
        spans = self._own(spans) if spans else spans
        table += array("q", chain(*zip(*spans, strict=True))).tobytes()
        table += bytes(-len(table) % 16)  # one alignment whatever the number of tensors, so one compiled variant
        watched = array("q", self._own(observed)).tobytes() if observed else b""
        watched += bytes(-len(watched) % 16)
        rows = self._own(rows)
        alike = rows.count(rows[0]) == len(rows)  # as most are, and then multiplied faster than joined
        numbers = rows[0] * len(rows) if alike else b"".join(rows)
        pieces = [table, watched, *(array("q", self._own(column)).tobytes() for column in moving), numbers]
        pointer_table = self.sender.send(b"".join(pieces), device, capturable=bool(moving))  # and what follows it
        rest = pointer_table[(len(table) + len(watched)) // 8 :]
        if moving:
            constants = rest[2 * self.n :].view(torch.float64)
            moved = rest, constants, pointer_table[9 * self.n :], self.n
            scalar_table = rows_on_device(*moved, control, counts=not looks)
        else:
            scalar_table = rest.view(torch.float32)
        p, g, m = dtypes
        narrower = p if p.primitive_bitwidth < g.primitive_bitwidth else g
        path = self.variant
        factors = sums = seen = scalar_table  # pointers that are not read
        if options["LIMITED"] and limits is None:
            partials = torch.empty(self.n_chunks, dtype=torch.float32, device=device)
            factors = torch.empty(self.n, dtype=torch.float32, device=device)
            if looks:
                seen = torch.empty(2, self.n_chunks, dtype=torch.float32, device=device)
            self._start(
                norm_kernel, self.n_chunks, self.layout, pointer_table, scalar_table, self.first_chunks, partials,
                seen, self.n, self.tiles_per_chunk, self.n_chunks, G=g, M=m, Q=options["Q"],
                SKIPPABLE=control is not None, LOOKS=looks,
                **path, **alignment(g, m, self.level, self.flat),
            )  # fmt: skip
            if squares is not None:
                self._start(sum_kernel, self.n, self.first_chunks, partials, factors, BLOCK=LIMITER_BLOCK)
                squares[slice(None) if self.index is None else self.index] = factors
            if looks or squares is not None:
                decided, limits = yield seen
            if looks:
                control = decided
                scalar_table = rows_on_device(*moved, control)
            if limits is None:
                self._start(
                    limiter_kernel, self.n, pointer_table, scalar_table, self.first_chunks, partials, factors,
                    self.n, BLOCK=LIMITER_BLOCK, SKIPPABLE=control is not None,
                )  # fmt: skip
        if limits is not None:
            factors = (limits if self.index is None else limits[self.index]).float().reciprocal()
        if observed:
            sums = torch.empty(3 * self.n_tiles, dtype=torch.float32, device=device)
        self._start(
            step_kernel, self.n_tiles, self.layout, pointer_table, scalar_table, factors, sums,
            self.n, P=p, G=g, M=m, SKIPPABLE=control is not None, OBSERVED=bool(observed),
            SPAN=_span_kind(spans, self.flat), **options, **path,
            **alignment(narrower, m, self.level, self.flat),
        )  # fmt: skip
        if observed:
            self._start(
                observe_kernel, self.n, self.layout, pointer_table[len(table) // 8 :], scalar_table, factors, sums,
                self.n, self.n_tiles, BLOCK=OBSERVE_BLOCK, LIMITED=options["LIMITED"],
                SKIPPABLE=control is not None,
            )  # fmt: skip

    def _start(self, kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
        """Launch a kernel; what Triton compiled the first time is used again without binding arguments anew.

        It serves as long as Triton would find it: sizes are this launch's own, and all pointers multiples of 16.
        """
        key = (kernel, *constants.values())
        compiled, rest = self.kernels.get(key, (None, ()))
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *rest)
            return
        compiled = kernel[(programs,)](*arguments, **constants, **UNFUSED)
        if isinstance(compiled, CompiledKernel):  # interpreted kernels give nothing
            rest = tuple(constants.get(name) for name in kernel.arg_names[len(arguments) :])
            self.kernels[key] = compiled, rest

    def _own(self, column: list[Any]) -> list[Any]:
        return column if self.chosen is None else [column[i] for i in self.chosen]

    def _own_words(self, column: bytes) -> bytes:
        return column if self.chosen is None else b"".join([column[8 * i : 8 * i + 8] for i in self.chosen])


def _span_kind(spans: Sequence[Sequence[int]], flat: bool) -> int:
    """How shards lie in whole tensors: 0 they are whole, 1 a shift that leaves random bits in order, 2 anyhow."""
    if not spans:
        return 0
    shifted = all(
        run == pitch and run_c == pitch_c and first_c % 4 == 0 and (not flat or first % 8 == 0)
        for first, run, pitch, first_c, run_c, pitch_c in spans
    )
    return 1 if shifted else 2


def _plan(params: Sequence[Tensor], misaligned: list[bool], level: int, quantized: bool) -> list[Launch]:
    """Group the tensors that are not empty by path."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for i, p in enumerate(params):
        if p.numel():
            chosen[is_flat(p, misaligned[i], level)].append(i)
    return [Launch(params, indices, level, flat, quantized) for flat, indices in chosen.items() if indices]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


class _Kinds(NamedTuple):
    """What tensors are, but for addresses and values."""

    packed: bool
    """Whether all parameters are contiguous."""
    plain: bool
    """Whether all gradients are, and mean what they hold."""
    dtypes: set[torch.dtype]
    sizes: list[torch.Size]

    @classmethod
    def of(cls, params: Sequence[Tensor], grads: Sequence[Tensor]) -> _Kinds:
        plain = all(map(Tensor.is_contiguous, grads)) and not any(map(Tensor.is_neg, grads))
        return cls(
            all(map(Tensor.is_contiguous, params)), plain, set(map(_DTYPE, grads)), list(map(Tensor.size, grads))
        )

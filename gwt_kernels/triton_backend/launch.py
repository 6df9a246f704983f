"""Launches of the kernels; for the step, tables of pointers and numbers, made on the host and sent in one copy."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gwt_kernels.hyper import Hyper, Rounding, Rule, Span, quantum
from gwt_kernels.triton_backend.control import N_CONSTANTS, N_SCALARS
from gwt_kernels.triton_backend.control_launch import rows as rows_on_device
from gwt_kernels.triton_backend.haar import dwt_kernel, idwt_kernel
from gwt_kernels.triton_backend.step import limiter_kernel, norm_kernel, observe_kernel, step_kernel, sum_kernel
from gwt_kernels.triton_backend.tables import TRITON_DTYPES, Sender, device_guard, off

__all__ = ["TRITON_DTYPES", "Launch", "alignment", "gwt_adamw_", "haar_dwt", "haar_idwt", "update_sums", "variant"]

FLAT_TILE, FLAT_WARPS = 4096, 8  # elements that one program updates at a time, and its warps
ROW_TILE, ROW_WARPS = 1024, 4  # a row takes more registers per element: offsets, masks and a division
MAX_CHUNKS = 8192  # partial norms per launch, or a few more: the limiter's memory does not grow with the model
LIMITER_BLOCK = 1024
OBSERVE_BLOCK = 1024
MAX_ROW = 1 << 29  # width up to which offsets within a tile of the row path fit 32 bits

_DTYPE = attrgetter("dtype")
_pack_constants = struct.Struct(f"{N_CONSTANTS.value}d").pack
_pack_scalars = struct.Struct(f"{N_SCALARS.value}f").pack


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
    same_grads: bool = False,
    sums: Tensor | None = None,
) -> None:
    """See :func:`gwt_kernels.functional.gwt_adamw_`; arguments are already checked. Where ``sums`` are given, they
    are all that is written: see :func:`update_sums`.

    Tensors that the flat path can take share one launch per pass, the others a second one. A parameter that is
    not contiguous is updated in a contiguous copy, which is then copied back; a gradient is only copied.

    What lies in ``workspace`` serves as long as the parameters are the same objects, and all addresses but the
    gradients' stay; of those, sizes, dtype and alignment must.
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
    known = workspace.get("places") if same_tensors else None
    own = list(map(Tensor.data_ptr, params)) if known is None else known[0]
    places = [own, *(list(map(Tensor.data_ptr, x)) for x in owned[1:])]
    kept = places == workspace.get("places") and (known is not None or _same(params, workspace["params"]))
    # Not a matter of addresses: p.data may be transposed.
    contiguous = workspace["contiguous"] if known is not None else all(map(Tensor.is_contiguous, params))
    packed = params if contiguous else [p.contiguous() for p in params]

    given = list(map(Tensor.data_ptr, grads))
    addresses = given
    if same_grads and given == workspace.get("given") and all(map(Tensor.is_contiguous, grads)):
        kinds = workspace["kinds"]
    else:
        if not all(map(Tensor.is_contiguous, grads)) or any(map(Tensor.is_neg, grads)):
            grads = [g.resolve_neg().contiguous() for g in grads]
            addresses, given = list(map(Tensor.data_ptr, grads)), []  # the next call has to copy again
        if known is None:
            kinds = set(map(_DTYPE, grads)), list(map(Tensor.size, grads)), list(map(off, addresses))
        else:
            kinds = *workspace["kinds"][:2], list(map(off, addresses))

    counted = steps.data_ptr() if isinstance(steps, Tensor) else 0
    options = (level, limited, rounding, keys if random else (), bool(counted))
    if not (kept and contiguous and workspace["kinds"] == kinds and workspace["options"] == options):
        _check_bucket([packed, grads, *owned[1:4]] if limited else [packed, grads, *owned[1:3]], level)
        if split:
            _check_lows(packed, owned[4])
        if quantized:
            _check_scales(exp_avgs, owned[5:], level)
        absent = [0] * len(params)
        columns = [column or absent for column in places]
        columns[0] = places[0] if contiguous else list(map(Tensor.data_ptr, packed))
        first, m, v, norm, low, *scale = columns
        misaligned = [off(a | b | c | d | e) for a, b, c, d, e in zip(first, addresses, m, v, low, strict=True)]
        fixed = [first, m, v, *([norm] if limited else [])]
        if random or split or counted:
            fixed = [first, m, v, norm, list(keys), low, *scale]
        plan = (level, quantized, params[0].device, list(map(Tensor.size, packed)), misaligned)
        if plan != workspace.get("plan"):
            workspace["launches"] = _plan(packed, misaligned, level, quantized)
            workspace["empty"] = [i for i, p in enumerate(packed) if not p.numel()]
        for launch in workspace["launches"]:
            launch.aim(fixed)
        workspace.update(plan=plan, places=places, params=list(params), contiguous=contiguous, options=options)
    workspace.update(given=given, kinds=kinds)
    moving: list[Any] = []
    if isinstance(steps, Tensor):
        rows, counts = _constants(hypers, level), [0] * len(params)  # rows_kernel writes the counts
        moving = [range(counted, counted + 8 * len(params), 8), _lr_addresses(hypers)]
        for i in workspace["empty"]:  # in no launch
            steps[i].add_(1.0 if control is None else control[1])
    else:
        rows, counts = _scalars(hypers, steps, level), list(steps) if random else []
    # A random bit's index is that of the whole tensor.
    whole = [[*a, *b] for a, b in spans] if spans is not None and random else []
    q = quantum(level) if quantized else 0
    dtypes = [TRITON_DTYPES[x[0].dtype] for x in (packed, grads, exp_avgs)]
    observed = [] if telemetry is None else [telemetry.data_ptr() + 48 * i for i in range(len(params))]
    with device_guard(params[0].device):
        for launch in workspace["launches"]:
            launch.run(
                addresses, counts, moving, whole, rows, control, observed, dtypes, limits, sums,
                LIMITED=limited or limits is not None, FOLDED=rule == "foam", ROUNDING=rounding, Q=q,
            )  # fmt: skip
    if packed is not params and sums is None:
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
    same_tensors: bool = False,
    same_grads: bool = False,
) -> Tensor:
    """See :func:`gwt_kernels.functional.update_sums`; arguments are already checked."""
    n = len(params)
    sums = torch.zeros(n, dtype=torch.float32, device=params[0].device)
    gwt_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [None] * n,
        steps,
        hypers,
        level=level,
        rule="gwt",
        rounding="nearest",
        keys=[0] * n,
        lows=[None] * n,
        scales=scales,
        control=control,
        workspace=workspace,
        same_tensors=same_tensors,
        same_grads=same_grads,
        sums=sums,
    )
    return sums


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
        device = params[0].device
        layout = [_layout(params[i], 2**level) for i in chosen]
        tiles = [-(-n_blocks // self.tile_blocks) for n_blocks, _, _ in layout]
        first_tiles = [0, *accumulate(tiles)]
        self.n_tiles = first_tiles[-1]
        columns = chain(first_tiles[:-1], *zip(*layout, strict=True))
        self.layout = self.sender.send(array("q", columns).tobytes(), device).view(torch.int64)
        # Chunks: runs of tiles of one tensor, whose partial norms the limiter adds up.
        self.tiles_per_chunk = -(-self.n_tiles // MAX_CHUNKS)
        first_chunks = [0, *accumulate(-(-t // self.tiles_per_chunk) for t in tiles)]
        self.n_chunks = first_chunks[-1]
        self.first_chunks = self.sender.send(array("q", first_chunks).tobytes(), device).view(torch.int64)
        indices = array("q", self.chosen or ()).tobytes()
        self.index = self.sender.send(indices, device).view(torch.int64) if indices else None

    def aim(self, addresses: list[list[int]]) -> None:
        """Take the columns of the pointers' table that stay from step to step: all but gradients and step."""
        p, *others = (array("q", self._own(column)).tobytes() for column in addresses)
        self.before_grads, self.after_grads = p, b"".join(others)

    def run(
        self,
        grad_addresses: list[int],
        counts: list[int],
        moving: list[Any],
        spans: list[list[int]],
        rows: list[bytes],
        control: Tensor | None,
        observed: list[int],
        dtypes: list[tl.dtype],
        limits: Tensor | None,
        squares: Tensor | None,
        **options: bool | str | int,
    ) -> None:
        """Send the tables, then launch one kernel per pass; nothing here waits for the device.

        ``moving`` are the addresses of step counts and learning rates that only the device knows: ``rows`` are then
        the constants from which a kernel makes the numbers of this step. ``observed`` are telemetry's rows.
        """
        device = self.layout.device
        table = self.before_grads + array("q", self._own(grad_addresses)).tobytes() + self.after_grads
        table += array("q", self._own(counts)).tobytes() if counts else b""
        spans = self._own(spans) if spans else spans
        table += array("q", chain(*zip(*spans, strict=True))).tobytes()
        table += bytes(-len(table) % 16)  # one alignment whatever the number of tensors, so one compiled variant
        watched = array("q", self._own(observed)).tobytes() if observed else b""
        watched += bytes(-len(watched) % 16)
        pieces = [table, watched, *(array("q", self._own(column)).tobytes() for column in moving), *self._own(rows)]
        sent = self.sender.send(b"".join(pieces), device, capturable=bool(moving))
        pointer_table, rest = sent[: len(table)].view(torch.int64), sent[len(table) + len(watched) :]
        if moving:
            addresses, constants = rest[: 16 * self.n].view(torch.int64), rest[16 * self.n :].view(torch.float64)
            scalar_table = rows_on_device(addresses, constants, control, pointer_table[9 * self.n :], self.n)
        else:
            scalar_table = rest.view(torch.float32)
        p, g, m = dtypes
        narrower = min(p, g, key=lambda dtype: dtype.primitive_bitwidth)
        path = self.variant
        skippable = control is not None
        factors = sums = scalar_table  # pointers that are not read
        if limits is not None:
            factors = (limits if self.index is None else limits[self.index]).float().reciprocal()
        elif options["LIMITED"] or squares is not None:
            partials = torch.empty(self.n_chunks, dtype=torch.float32, device=device)
            factors = torch.empty(self.n, dtype=torch.float32, device=device)
            norm_kernel[(self.n_chunks,)](
                self.layout, pointer_table, scalar_table, self.first_chunks, partials,
                self.n, self.tiles_per_chunk, G=g, M=m, Q=options["Q"], SKIPPABLE=skippable,
                **path, **alignment(g, m, self.level, self.flat),
            )  # fmt: skip
            if squares is not None:
                sum_kernel[(self.n,)](self.first_chunks, partials, factors, BLOCK=LIMITER_BLOCK)
                squares[slice(None) if self.index is None else self.index] = factors
                return
            limiter_kernel[(self.n,)](
                pointer_table, scalar_table, self.first_chunks, partials, factors, self.n,
                BLOCK=LIMITER_BLOCK, SKIPPABLE=skippable,
            )  # fmt: skip
        if observed:
            sums = torch.empty(3 * self.n_tiles, dtype=torch.float32, device=device)
        step_kernel[(self.n_tiles,)](
            self.layout, pointer_table, scalar_table, factors, sums,
            self.n, P=p, G=g, M=m, SKIPPABLE=skippable, OBSERVED=bool(observed), SPAN=_span_kind(spans, self.flat),
            **options, **path,
            **alignment(narrower, m, self.level, self.flat),
        )  # fmt: skip
        if observed:
            observed_rows = sent[len(table) : len(table) + len(watched)].view(torch.int64)
            observe_kernel[(self.n,)](
                self.layout, observed_rows, scalar_table, factors, sums, self.n, self.n_tiles,
                BLOCK=OBSERVE_BLOCK, LIMITED=options["LIMITED"], SKIPPABLE=skippable,
            )  # fmt: skip

    def _own(self, column: list[Any]) -> list[Any]:
        return column if self.chosen is None else [column[i] for i in self.chosen]


def _span_kind(spans: Sequence[Sequence[int]], flat: bool) -> int:
    """How shards lie in whole tensors: 0 they are whole, 1 a shift that leaves random bits in order, 2 anyhow."""
    if not spans:
        return 0
    shifted = all(
        run == pitch and run_c == pitch_c and first_c % 4 == 0 and (not flat or first % 8 == 0)
        for first, run, pitch, first_c, run_c, pitch_c in spans
    )
    return 1 if shifted else 2


def variant(level: int, flat: bool, quantized: bool = False) -> dict[str, Any]:
    """The compile-time constants of a path at a level, and the number of warps."""
    tile, warps = (FLAT_TILE, FLAT_WARPS) if flat else (ROW_TILE, ROW_WARPS)
    if flat and quantized and level < 2:
        tile //= 2  # of a whole one a lane would encode 8 moments or more at once, for which registers run out
    return {"W": 2**level, "NB": max(1, tile >> level), "FLAT": flat, "num_warps": warps}


def alignment(data: tl.dtype, moments: tl.dtype, level: int, flat: bool) -> dict[str, int]:
    """Bytes that a thread accesses at once, of ``data`` (weights or gradients, the narrower) and of moments."""
    size = moments.primitive_bitwidth // 8
    if not flat:
        return {"ALIGN": data.primitive_bitwidth // 8, "MOMENT_ALIGN": size}
    blocks = max(1, 128 // data.primitive_bitwidth >> level)
    return {"ALIGN": 16, "MOMENT_ALIGN": min(16, blocks * size)}


def haar_dwt(x: Tensor, level: int) -> list[Tensor]:
    """See :func:`gwt_kernels.haar_dwt`; arguments are already checked."""
    if level == 0:
        return [x.clone(memory_format=torch.contiguous_format)]
    x = x.contiguous()
    widths = [-(-x.shape[-1] // 2**i) for i in (level, *range(level, 0, -1))]
    coeffs = [x.new_empty(*x.shape[:-1], width) for width in widths]
    _launch_haar(dwt_kernel, x, coeffs)
    return coeffs


def haar_idwt(coeffs: list[Tensor], length: int) -> Tensor:
    """See :func:`gwt_kernels.haar_idwt`; arguments are already checked."""
    if len(coeffs) == 1:
        return coeffs[0].clone(memory_format=torch.contiguous_format)
    coeffs = [c.contiguous() for c in coeffs]
    x = coeffs[0].new_empty(*coeffs[0].shape[:-1], length)
    _launch_haar(idwt_kernel, x, coeffs)
    return x


def _launch_haar(kernel: Any, x: Tensor, coeffs: Sequence[Tensor]) -> None:
    if x.numel() == 0:
        return
    level = len(coeffs) - 1
    _check_row(x.shape[-1], level)
    flat = _is_flat(x, any(off(c.data_ptr()) for c in (x, *coeffs)), level)
    options = variant(level, flat)
    n_blocks, row_width, row_blocks = _layout(x, 2**level)
    width = options.pop("W")
    multiple = max(1, 8 // width) if flat else 1
    with device_guard(x.device):
        kernel[(-(-n_blocks // options["NB"]),)](
            x, tuple(coeffs), n_blocks, row_width, row_blocks, LEVEL=level, MULTIPLE=multiple, **options
        )


def _check_bucket(arrays: Sequence[Sequence[Tensor]], level: int) -> None:
    """Raise unless the kernels may trust the tensors: one device, one dtype an array, the shapes of a step."""
    params, grads, exp_avgs, exp_avg_sqs, *norms = arrays
    for name, tensors in zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "limiter_norms"), arrays, strict=False):
        kinds = {(x.dtype, x.device) for x in tensors}
        if len(kinds) > 1 or tensors[0].device != params[0].device:
            raise ValueError(
                f"{name} are of {sorted(map(str, kinds))}, params on {params[0].device}: a bucket has one device, "
                f"and one dtype each of parameters, gradients and moments"
            )
    second = torch.uint8 if exp_avgs[0].dtype == torch.int8 else exp_avgs[0].dtype
    if exp_avg_sqs[0].dtype != second or (norms and norms[0][0].dtype != torch.float32):
        raise ValueError(
            "exp_avgs and exp_avg_sqs must have one dtype, or int8 and uint8, and limiter_norms must be float32"
        )
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        expected = (*p.shape[:-1], -(-p.shape[-1] // 2**level)) if p.dim() else ()
        if g.shape != p.shape or m.shape != expected or v.shape != expected:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} at level {level} needs a gradient of its shape and moments "
                f"of shape {expected}, got {tuple(g.shape)}, {tuple(m.shape)} and {tuple(v.shape)}"
            )
        if not (m.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"the moments of a parameter of shape {tuple(p.shape)} must be contiguous")
        _check_row(p.shape[-1] if p.dim() else 1, level)


def _check_scales(exp_avgs: Sequence[Tensor], scales: Sequence[Sequence[Tensor]], level: int) -> None:
    for m, *both in zip(exp_avgs, *scales, strict=True):
        expected = (-(-m.numel() // quantum(level)),)
        for x in both:
            if (x.dtype, tuple(x.shape), x.device, x.is_contiguous()) != (torch.float32, expected, m.device, True):
                raise ValueError(
                    f"int8 moments of shape {tuple(m.shape)} at level {level} need contiguous float32 scales of "
                    f"shape {expected} on {m.device}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
                )


def _check_lows(params: Sequence[Tensor], lows: Sequence[Tensor]) -> None:
    for p, low in zip(params, lows, strict=True):
        if (p.dtype, low.dtype, low.shape, low.device) != (torch.bfloat16, torch.int16, p.shape, p.device):
            raise ValueError(
                f"rounding='split' needs bfloat16 parameters, and an int16 low half of each one's shape beside it, "
                f"got {p.dtype} and {low.dtype}, shapes {tuple(p.shape)} and {tuple(low.shape)}, on {low.device}"
            )
        if not low.is_contiguous():
            raise ValueError(f"the low half of a parameter of shape {tuple(p.shape)} must be contiguous")


def _plan(params: Sequence[Tensor], misaligned: list[int], level: int, quantized: bool) -> list[Launch]:
    """Group the tensors that are not empty by path."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for i, p in enumerate(params):
        if p.numel():
            chosen[_is_flat(p, misaligned[i], level)].append(i)
    return [Launch(params, indices, level, flat, quantized) for flat, indices in chosen.items() if indices]


def _check_row(width: int, level: int) -> None:
    if width % 2**level and width > MAX_ROW:
        raise RuntimeError(
            f"the Triton backend takes rows of up to {MAX_ROW} elements where 2**level does not divide them, "
            f"got {width}: use backend='torch'"
        )


def _is_flat(p: Tensor, misaligned: int, level: int) -> bool:
    """Whether the flat path can take a tensor. Both paths update the same arrays, so this may change."""
    whole_blocks = p.dim() == 0 or p.shape[-1] % 2**level == 0
    return whole_blocks and not misaligned and p.numel() % 8 == 0


def _layout(p: Tensor, width: int) -> tuple[int, int, int]:
    """Number of blocks, elements per row and blocks per row. Whole blocks lie end to end: any row will do."""
    n = p.shape[-1] if p.dim() else 1
    if n % width == 0:
        return p.numel() // width, width, 1
    row_blocks = -(-n // width)
    return p.numel() // n * row_blocks, n, row_blocks


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _scalars(hypers: Sequence[Hyper], steps: Sequence[int], level: int) -> list[bytes]:
    """One row of numbers per tensor; rows of neighbours that share options and step are made once."""
    if list(steps).count(steps[0]) == list(hypers).count(hypers[0]) == len(steps):
        return [_row(hypers[0], steps[0], level)] * len(steps)
    rows: list[bytes] = []
    last: tuple[Hyper, int] | None = None
    for hyper, step in zip(hypers, steps, strict=True):
        if last is not None and hyper is last[0] and step == last[1]:
            rows.append(rows[-1])
        else:
            rows.append(_row(hyper, step, level))
            last = (hyper, step)
    return rows


def _constants(hypers: Sequence[Hyper], level: int) -> list[bytes]:
    """One row per tensor of what `rows_kernel` takes; rows of neighbours that share options are made once."""
    rows: list[bytes] = []
    last: Hyper | None = None
    for hyper in hypers:
        if hyper is not last:
            last = hyper
            row = _pack_constants(
                0.0 if isinstance(hyper.lr, Tensor) else hyper.lr,
                hyper.beta1,
                hyper.beta2,
                hyper.eps,
                hyper.weight_decay,
                hyper.scale if level else 1.0,
                hyper.norm_growth_limit or 0.0,
                hyper.signed_factor,
            )
        rows.append(row)
    return rows


def _lr_addresses(hypers: Sequence[Hyper]) -> list[int]:
    """Where the learning rates that are tensors lie, 0 for those that are numbers."""
    return [hyper.lr.data_ptr() if isinstance(hyper.lr, Tensor) else 0 for hyper in hypers]


def _row(hyper: Hyper, step: int, level: int) -> bytes:
    return _pack_scalars(
        hyper.beta1,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.eps,
        float(hyper.lr) * hyper.weight_decay,
        hyper.step_size(step, level),
        hyper.norm_growth_limit or 0.0,
        hyper.signed_factor,
        1.0,
    )

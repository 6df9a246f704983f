"""Launches of the step's kernels for the tensors of a bucket that take one path: their tables, and the kernels."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.control_launch import rows as rows_on_device
from gwt_kernels.backends.triton.layout import (
    alignment,
    blocks_together,
    row_variant,
    rows_by_row,
    rows_of,
    tiles_of_program,
    variant,
)
from gwt_kernels.backends.triton.norms import limiter_kernel, observe_kernel, sum_kernel
from gwt_kernels.backends.triton.schema import DEVICE_SCALARS, POINTERS
from gwt_kernels.backends.triton.shared_rows import shared_step_kernel
from gwt_kernels.backends.triton.step import norm_kernel, step_kernel
from gwt_kernels.backends.triton.tables import (
    TRITON_DTYPES,
    Sender,
    constant_rows,
    lr_ptrs,
    owners,
    scalar_rows,
)
from gwt_kernels.backends.triton.whole_rows import row_norm_kernel, row_step_kernel
from gwt_kernels.core.hyper import padded_spans
from gwt_kernels.core.level import ROW

MAX_CHUNKS = 8192  # partial norms per launch, or a few more: the limiter's memory does not grow with the model
LIMITER_BLOCK = 1024
OBSERVE_BLOCK = 1024

_TENSORS = POINTERS[: POINTERS.index("norm") + 1]
_STATE = POINTERS[: POINTERS.index("step") + 1]  # followed by the spans of shards


class Sent:
    """The tables of one step on the device, and the results of its first phase.

    Attributes:
        pointers: int64: addresses of the tensors' arrays.
        scalars: float32 ``[n, 12]``: the step's scalars.
        telemetry: int64 ``[n]``: addresses of the rows of telemetry.
        factors: float32 ``[n]``: ``1 / clip`` of each tensor whose second moment is factored.
        partials: float32 ``[chunks]``: partial sums of the update's squares.
        grad_stats: float32 ``[2, chunks]``: statistics of the gradients from the first phase.
        row_sums: float32 ``[rows, numbers]``: sums over whole rows, if this process has parts of them.
        can_skip: Whether the device may decide to skip the step.
    """

    factors: Tensor
    row_sums: Tensor | None = None
    partials: Tensor | None = None
    grad_stats: Tensor | None = None

    def __init__(self, pointers: Tensor, telemetry: Tensor, rest: Tensor, n: int, counted: bool) -> None:
        self.pointers, self.telemetry, self._rest, self._n = pointers, telemetry, rest, n
        self.can_skip = False
        if not counted:
            self.scalars = rest.view(torch.float32)

    def decide(self, decision: Tensor | None, *, counts: bool = True) -> None:
        """Compute the scalars of a step that the device counts; with ``counts`` also update stored counts."""
        n = self._n
        constants = self._rest[len(DEVICE_SCALARS) * n :].view(torch.float64)
        steps = self.pointers[POINTERS.index("step") * n :]
        self.scalars = rows_on_device(self._rest, constants, steps, n, decision, counts=counts)
        self.can_skip = decision is not None


class Launch:
    """Tensors of one bucket and one path, with the tables that stay the same from step to step.

    Args:
        bucket: Their bucket.
        chosen: Indices of the tensors in the bucket.
        flat: Whether they take the flat path.
    """

    def __init__(self, bucket: Bucket, chosen: list[int], flat: bool) -> None:
        self._chosen = chosen if len(chosen) < len(bucket) else None  # None: all of them, in order
        self.n = len(chosen)
        self.flat = flat
        level, device = bucket.level, bucket.device
        self._bucket = bucket
        self._rule = bucket.stated.kernel
        self._reads = bucket.stated.reads_weights
        shared: dict[str, Any] = {
            "MOMENTS": self._rule.moments,
            "SLOTS": len(bucket.moments),
            "SQUARES": bucket.squares or "",
        }
        self._sender = Sender()
        self._kernels: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        p, g, m = (TRITON_DTYPES[d] for d in (bucket.params[0].dtype, bucket.grad_dtype, bucket.stored.dtypes[0]))
        self._dtypes = p, g, m
        if bucket.is_by_rows or level == ROW:
            rows_ = [rows_by_row(bucket.params[i], level) for i in chosen]
            shared["GIVEN"] = bucket.row_numbers
            if bucket.row_numbers:
                firsts = [0, *accumulate(bucket.n_rows)]
                rows_ = [
                    own._replace(row_length=bucket.row_length(i), first_row=firsts[i])
                    for own, i in zip(rows_, chosen, strict=True)
                ]
            shared["V"] = TRITON_DTYPES[bucket.moments[-1][0].dtype] if bucket.moments else m
            self._path = self._step_path = shared | row_variant(max(own.width for own in rows_), level, flat)
            if level == ROW:
                self._step_path = {"READS": self._reads, **self._path}
            tiles = programs = [own.n_blocks for own in rows_]
        else:
            together = blocks_together(level, bucket.stored, bucket.rounding == "stochastic")
            rows_ = [rows_of(bucket.params[i], 2**level, together) for i in chosen]
            shared["Q"] = bucket.stored.block_size(level) if bucket.is_quantized else 0
            self._path = shared | variant(level, flat, bucket.is_quantized)
            tiles = [-(-own.n_blocks // self._path["NB"]) for own in rows_]
            own_tiles = tiles_of_program(level, flat, bucket.is_quantized)
            self._step_path = {"TILES": own_tiles, "READS": self._reads, **self._path}
            programs = [-(-n // own_tiles) for n in tiles]
        first_programs = [0, *accumulate(programs)]
        self.n_tiles, self.n_programs = sum(tiles), first_programs[-1]
        layout = chain(*([first, *own] for first, own in zip(first_programs, rows_, strict=False)))
        self._layout = self._sender.send(array("q", layout).tobytes(), device)
        self._owners = owners(self._sender.send(array("q", programs).tobytes(), device), self.n_programs)
        # Chunks: runs of tiles of one tensor, whose partial norms the limiter adds up.
        self.tiles_per_chunk = -(-self.n_tiles // MAX_CHUNKS)
        first_chunks = [0, *accumulate(-(-t // self.tiles_per_chunk) for t in tiles)]
        self.n_chunks = first_chunks[-1]
        self._first_chunks = self._sender.send(array("q", first_chunks).tobytes(), device)
        self._chunk_owners = owners(self._first_chunks.diff(), self.n_chunks)
        indices = array("q", self._chosen or ()).tobytes()
        self._index = self._sender.send(indices, device) if indices else None
        # Random bits depend on the index in the whole tensor.
        spans = bucket.spans if bucket.is_random else None
        self._spans = [] if spans is None else [[*spans[i][0], *spans[i][1]] for i in chosen]
        padded = [padded_spans(bucket.params[i].shape, level) for i in chosen]
        self._span_kind = _span_kind(self._spans, [(*own[0][1:], *own[1][1:]) if own else None for own in padded])
        if self._span_kind == 2 and flat and (of_calls := _spans_of_calls(self._spans)):
            self._span_kind, self._spans = 3, of_calls
        self._span_words = array("q", chain(*zip(*self._spans, strict=True))).tobytes()
        rows = bucket.telemetry
        self._rows = [] if rows is None else [row.data_ptr() for row in rows.unbind()]
        wider = p if p.primitive_bitwidth > g.primitive_bitwidth else g
        held = ROW if bucket.is_by_rows else level
        self._norm_alignment = alignment(g, m, held, flat)
        self._step_alignment = alignment(wider, m, held, flat)

    def set_pointers(self, columns: Mapping[str, bytes]) -> None:
        """Set the columns of the pointer table that stay from step to step: all except gradients and steps."""
        self._columns = {name: self._own_words(column) for name, column in columns.items()}

    def send(self, grad_ptrs: bytes, inputs: StepInputs, decision: Tensor | None, counts: bool) -> Sent:
        """Send the tables of a step.

        Args:
            grad_ptrs: Addresses of the bucket's gradients.
            inputs: Inputs of the step.
            decision: Step decision, or None.
            counts: Whether a device that counts steps counts this one now.
        """
        bucket, n = self._bucket, self.n
        counted = isinstance(inputs.steps, Tensor)
        random = bucket.is_random or bucket.rounding == "split"
        device_scalars: list[Any] = []
        if isinstance(inputs.steps, Tensor):
            rows, counts_of = (
                constant_rows(inputs.hypers, bucket.stated),
                [0] * len(bucket),
            )  # the device writes these
            first = inputs.steps.data_ptr()
            device_scalars = [range(first, first + 8 * len(bucket), 8), lr_ptrs(inputs.hypers)]
        else:
            rows = scalar_rows(inputs.hypers, inputs.steps, bucket.stated)
            counts_of = list(inputs.steps) if bucket.is_random else []
        columns = self._columns
        columns["g"] = self._own_words(grad_ptrs)
        columns["step"] = array("q", self._own(counts_of)).tobytes() if counts_of else b""
        read = _STATE if random or counted else _TENSORS if bucket.is_limited else _TENSORS[:-1]
        table = b"".join([*map(columns.__getitem__, read), self._span_words])
        table += bytes(-len(table) % 16)  # one alignment whatever the number of tensors, so one compiled variant
        telemetry = array("q", self._own(self._rows)).tobytes() if self._rows else b""
        telemetry += bytes(-len(telemetry) % 16)
        rows = self._own(rows)
        alike = rows.count(rows[0]) == n  # usually; to repeat a row is faster than to join rows
        numbers = rows[0] * n if alike else b"".join(rows)
        pieces = [table, telemetry, *(array("q", self._own(x)).tobytes() for x in device_scalars), numbers]
        sent = self._sender.send(b"".join(pieces), bucket.device, capturable=counted)
        after_table, after_telemetry = len(table) // 8, (len(table) + len(telemetry)) // 8
        result = Sent(sent, sent[after_table:], sent[after_telemetry:], n, counted)
        result.row_sums = inputs.row_sums
        if counted:
            result.decide(decision, counts=counts)
        return result

    def norms(self, sent: Sent, grad_stats: bool) -> None:
        """Compute partial sums of the update's squares and, if ``grad_stats``, statistics of the gradients."""
        device = self._layout.device
        _, g, m = self._dtypes
        sent.partials = torch.empty(self.n_chunks, dtype=torch.float32, device=device)
        if grad_stats:
            sent.grad_stats = torch.empty(2, self.n_chunks, dtype=torch.float32, device=device)
        stats = sent.scalars if sent.grad_stats is None else sent.grad_stats  # not written where None
        launch, rest = self._ready(
            row_norm_kernel if self._bucket.level == ROW else norm_kernel, self.n_chunks, G=g, M=m,
            CAN_SKIP=sent.can_skip, COLLECT_GRAD_STATS=grad_stats, DIRECTION=self._rule.direction, **self._path,
            **self._norm_alignment,
        )  # fmt: skip
        launch(
            self._chunk_owners, self._layout, sent.pointers, sent.scalars, self._first_chunks, sent.partials, stats,
            *self._of_rows(sent), self.n, self.tiles_per_chunk, self.n_chunks, *rest,
        )  # fmt: skip

    def _of_rows(self, sent: Sent) -> tuple[Tensor, ...]:
        """Return the further argument of kernels that take rows: sums over whole rows, or an unread tensor."""
        if not (self._bucket.is_by_rows or self._bucket.level == ROW):
            return ()
        return (sent.scalars if sent.row_sums is None else sent.row_sums,)

    def _step_kernel(self) -> Any:
        """Return the step's kernel: for tiles, for rows that are blocks, or for rows with one second moment."""
        if self._bucket.level == ROW:
            return row_step_kernel
        return shared_step_kernel if self._bucket.is_by_rows else step_kernel

    def add_up(self, sent: Sent, sums: Tensor) -> None:
        """Add up the partial sums of each tensor, and write them to ``sums``, float32 ``[len(bucket)]``."""
        own = torch.empty(self.n, dtype=torch.float32, device=self._layout.device)
        launch, rest = self._ready(sum_kernel, self.n, BLOCK=LIMITER_BLOCK)
        launch(self._first_chunks, sent.partials, own, *rest)
        sums[slice(None) if self._index is None else self._index] = own

    def update(self, sent: Sent, divisors: Tensor | None) -> None:
        """Update weights and moments, with the limiter's ``divisors`` if the caller has computed them."""
        bucket, device = self._bucket, self._layout.device
        p, g, m = self._dtypes
        limited = bucket.is_limited or divisors is not None
        factors = sums = sent.scalars  # pointers that are not read
        if divisors is not None:
            factors = (divisors if self._index is None else divisors[self._index]).float().reciprocal()
        elif limited:
            if sent.partials is None:
                self.norms(sent, grad_stats=False)
            factors = torch.empty(self.n, dtype=torch.float32, device=device)
            launch, rest = self._ready(limiter_kernel, self.n, BLOCK=LIMITER_BLOCK, CAN_SKIP=sent.can_skip)
            launch(sent.pointers, sent.scalars, self._first_chunks, sent.partials, factors, self.n, *rest)
        if self._rows:
            sums = torch.empty(3 * self.n_programs, dtype=torch.float32, device=device)
        launch, rest = self._ready(
            self._step_kernel(), self.n_programs, P=p, G=g, M=m, CAN_SKIP=sent.can_skip,
            TELEMETRY=bool(self._rows), SPAN=self._span_kind, LIMITED=limited, UPDATE=self._rule.update,
            ROUNDING=bucket.rounding, **self._step_path, **self._step_alignment,
        )  # fmt: skip
        launch(
            self._owners, self._layout, sent.pointers, sent.scalars, factors, sums, *self._of_rows(sent), self.n,
            *rest,
        )  # fmt: skip
        if self._rows:
            launch, rest = self._ready(
                observe_kernel, self.n, BLOCK=OBSERVE_BLOCK, LIMITED=limited, CAN_SKIP=sent.can_skip
            )
            launch(
                self._layout, sent.telemetry, sent.scalars, factors, sums, self.n, self.n_programs, *rest
            )  # fmt: skip

    def _ready(self, kernel: Any, programs: int, **constants: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return a launcher of a kernel, and the arguments that it takes after the kernel's.

        After the first time the compiled kernel is launched directly, without binding arguments. Triton would find
        the same one: sizes are constants of this launch, and all pointers are multiples of 16.
        """
        key = (kernel, *constants.values())
        return self._kernels.get(key) or (partial(self._compile, key, programs, constants), ())

    def _compile(self, key: tuple[Any, ...], programs: int, constants: dict[str, Any], *arguments: Any) -> None:
        """Launch a kernel for the first time; interpreted kernels are launched like this each time."""
        kernel = key[0]
        compiled = kernel[(programs,)](*arguments, **constants, **UNFUSED)
        if isinstance(compiled, CompiledKernel):
            rest = tuple(constants.get(name) for name in kernel.arg_names[len(arguments) :])
            self._kernels[key] = compiled[programs, 1, 1], rest

    def memory(self) -> list[Tensor]:
        """Return tensors that a step with other options would replace, but that replays of a captured step use."""
        return []

    def _own(self, column: Any) -> Any:
        return column if self._chosen is None else [column[i] for i in self._chosen]

    def _own_words(self, column: bytes) -> bytes:
        return column if self._chosen is None else b"".join([column[8 * i : 8 * i + 8] for i in self._chosen])


def _spans_of_calls(spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return equivalent spans whose runs are whole calls of Philox; an empty list if there are none.

    Runs that follow one another without a gap are equivalent to runs of another length, such as that of one call.
    """
    found = []
    for own in spans:
        parts = []
        for (first, run, pitch), call in ((own[:3], 8), (own[3:], 4)):
            parts += [first, call, call] if run == pitch else [first, run, pitch]
            if any(n % call for n in parts[-3:]):
                return []
        found.append(parts)
    return found


def _span_kind(spans: Sequence[Sequence[int]], padded: Sequence[tuple[int, ...] | None]) -> int:
    """Return the kind of shards' positions: 0 for whole tensors, 1 for a shift by whole Philox calls, 2 for others.

    Args:
        spans: First element, run and pitch, of weights and of moments; empty if all tensors are whole.
        padded: Runs and pitches of weights and moments if rows are padded, otherwise None.
    """
    if not spans:
        return 0
    for (first, run, pitch, first_c, run_c, pitch_c), rows in zip(spans, padded, strict=True):
        in_order = (run, pitch, run_c, pitch_c) == rows if rows else run == pitch and run_c == pitch_c
        if first % 8 or first_c % 4 or not in_order:
            return 2
    return 1

"""Run steps with a matrix stage between two element-wise ones, which make the matrices and use the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.backends import choice
from gwt_kernels.backends.bucket import Bucket, StepInputs
from gwt_kernels.backends.prepare import is_on_triton, prepare
from gwt_kernels.backends.runner import ElementwiseRunner, OnePassRunner
from gwt_kernels.core.hyper import Hyper, Span, padded_spans
from gwt_kernels.core.laid_out import MatrixPiece
from gwt_kernels.core.level import Level
from gwt_kernels.core.notes import COLUMNS
from gwt_kernels.core.send import send
from gwt_kernels.core.survey import PYTHON, Survey
from gwt_kernels.formats.moments import MomentFormat

_Spans = tuple[Span, Span]


_Stage = Callable[[Sequence[MatrixPiece], Sequence[Tensor]], None]


class MatrixStage(NamedTuple):
    """What happens to matrices between the two element-wise stages.

    Attributes:
        run: ``run(make, use)`` calls both for each batch: ``make(pieces, values)`` writes matrices into ``values``,
            where ``use(pieces, values)`` finds the results. ``pieces`` is the same list in each step.
        dtype: dtype of ``values``.
        scales: Factors on the update, one for each parameter.
        pieces: Pieces of all batches.
        names: Names of the parameters in errors.
    """

    run: Callable[[_Stage, _Stage], None]
    dtype: torch.dtype
    scales: Sequence[float]
    pieces: Sequence[MatrixPiece] = ()
    names: Sequence[str] = ()


def check_cut(piece: MatrixPiece, moments: Sequence[int], stored: MomentFormat, level: Level, name: str) -> None:
    """Raise a ValueError if a piece of a parameter splits the values of a scale of its quantized moments.

    Args:
        piece: The piece.
        moments: Shape of the parameter's moments.
        stored: Their format.
        level: Level of the transform.
        name: Name of the parameter in the error.
    """
    size, per_index = stored.block_size(level), math.prod(moments[1:])
    first, last = piece.start * per_index, (piece.start + piece.length) * per_index
    if first % size or (last % size and piece.start + piece.length < moments[0]):
        raise ValueError(
            f"{name} is too large for workspace_bytes, and cannot be cut where {size} of its {stored.name} moments "
            f"share a scale: allow more workspace_bytes, or keep its moments in bfloat16"
        )


_Of = Callable[[Sequence[Any]], list[Any]]


class _Batch(NamedTuple):
    """The runners of both stages for some pieces.

    Attributes:
        pieces: The pieces; kept alive, as the ``id`` of the list tells batches apart.
        of: Picks the items for the pieces' parameters from a sequence with one per parameter.
        grads: Picks the pieces' parts from all gradients.
        make: Runs the first stage.
        use: Runs the last stage.
        params: Indices of the pieces' parameters, int64 on the device.
        rows: Telemetry of the pieces, or None.
    """

    pieces: Sequence[MatrixPiece]
    of: _Of
    grads: _Of
    make: ElementwiseRunner
    use: ElementwiseRunner
    params: Tensor
    rows: Tensor | None


class MatrixRunner(OnePassRunner):
    """See :class:`gwt_kernels.backends.runner.Runner`. Each stage is one launch for a batch on the Triton backend.

    Args:
        bucket: The bucket that it updates, under a rule that has a last stage.
        backend: The requested backend for both stages.
        stage: The matrix stage.
    """

    def __init__(self, bucket: Bucket, backend: choice.Backend | None, stage: MatrixStage) -> None:
        self.bucket, self._backend, self._stage = bucket, backend, stage
        self._batches: dict[int, _Batch] = {}
        self._hypers: Sequence[Hyper] = []
        self._last_hypers: list[Hyper] = []  # for the last stage
        self._picked: dict[int, tuple[list[Hyper], list[Hyper]]] = {}  # those of each batch, for both stages
        self._columnless: tuple[list[MatrixPiece], Tensor] | None = None
        self._renews: ElementwiseRunner | None = None
        for piece in stage.pieces:
            if bucket.is_quantized and not self._is_whole(piece):
                moments = bucket.exp_avgs[piece.param].shape
                check_cut(piece, moments, bucket.stored, bucket.level, stage.names[piece.param])
        self.survey: Survey = PYTHON
        self._on_triton = is_on_triton(bucket, backend)
        if self._on_triton:
            from gwt_kernels.backends.triton.native import quickest

            self.survey = quickest()

    def apply(self, inputs: StepInputs, decision: Tensor | None = None, divisors: Tensor | None = None) -> None:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        unscaled = None  # the first stage has scaled the gradients
        if decision is not None:
            unscaled = torch.cat((torch.ones_like(decision[:1]), decision[1:]))
        self._adjust(inputs.hypers)

        def make(pieces: Sequence[MatrixPiece], values: Sequence[Tensor]) -> None:
            batch = self._batch(pieces, values, inputs)
            batch.make.set_params(values)
            own = _inputs(batch, batch.grads(inputs.grads), inputs.steps, self._hypers_of(batch)[0])
            batch.make.apply(own._replace(row_sums=self._rows_of(pieces, inputs)), decision)

        def use(pieces: Sequence[MatrixPiece], values: Sequence[Tensor]) -> None:
            batch = self._batches[id(pieces)]
            if batch.rows is not None:
                batch.rows.zero_()
            batch.use.apply(_inputs(batch, values, inputs.steps, self._hypers_of(batch)[1]), unscaled)

        self._stage.run(make, use)
        self._renew_without_columns(inputs, decision)
        if self.bucket.telemetry is not None:
            self._observe(decision)
        if isinstance(inputs.steps, Tensor):
            inputs.steps.add_(1.0 if decision is None else decision[1])

    def memory(self) -> list[object]:
        """See :class:`gwt_kernels.backends.runner.Runner`."""
        runners = chain.from_iterable((batch.make, batch.use) for batch in self._batches.values())
        return [self._stage, *chain.from_iterable(runner.memory() for runner in runners)]

    def _adjust(self, hypers: Sequence[Hyper]) -> None:
        """Make the last stage's options of each parameter if ``hypers`` differ from those of the last step."""
        if len(self._hypers) == len(hypers) and all(map(is_, hypers, self._hypers)):
            return
        made: dict[tuple[int, float], Hyper] = {}
        adjusted = []
        for hyper, scale in zip(hypers, self._stage.scales, strict=True):
            key = id(hyper), scale
            if key not in made:
                made[key] = hyper._replace(scale=hyper.scale * scale, grad_factor=1.0, maximize=False)
            adjusted.append(made[key])
        self._hypers, self._last_hypers = hypers, adjusted
        self._picked.clear()

    def _hypers_of(self, batch: _Batch) -> tuple[list[Hyper], list[Hyper]]:
        """Return the options of a batch's pieces in the first and in the last stage."""
        key = id(batch.pieces)
        if key not in self._picked:
            self._picked[key] = batch.of(self._hypers), batch.of(self._last_hypers)
        return self._picked[key]

    def _batch(self, pieces: Sequence[MatrixPiece], values: Sequence[Tensor], inputs: StepInputs) -> _Batch:
        """Return the runners of a batch, made in the first step that has it."""
        known = self._batches.get(id(pieces))
        if known is not None:
            return known
        bucket = self.bucket
        last = bucket.stated.last_stage
        assert last is not None
        shared = self._shared_of(pieces)
        first = self._first_of(pieces, values)
        rows = None
        if bucket.telemetry is not None:
            rows = torch.zeros(len(pieces), len(COLUMNS), dtype=torch.float64, device=bucket.device)
        lows: Any = [bucket.lows[piece.param] for piece in pieces]
        second = Bucket(
            [piece.of(bucket.params[piece.param]) for piece in pieces],
            None,
            None,
            grad_dtype=self._stage.dtype,
            rule=last.name,  # type: ignore[arg-type]  # a stage's, which no user names
            rounding=bucket.rounding,
            lows=[x.of(low) for low, x in zip(lows, pieces, strict=True)] if bucket.rounding == "split" else None,
            telemetry=rows,
            **(shared | {"level": self._last_level()}),
        )
        index = send(torch.tensor([x.param for x in pieces], dtype=torch.int64, device="cpu"), bucket.device)
        of = _picker([piece.param for piece in pieces])

        def parts(grads: Sequence[Tensor]) -> list[Tensor]:
            return [piece.of(g) for g, piece in zip(of(grads), pieces, strict=True)]

        is_whole = all(self._is_whole(piece) for piece in pieces)
        runners = prepare(first, self._backend), prepare(second, self._backend)
        made = _Batch(pieces, of, of if is_whole else parts, *runners, index, rows)
        self._batches[id(pieces)] = made
        return made

    def _last_level(self) -> Level:
        """Return the level of the last stage: 0 on Triton, so that blocks are elements, and rows one aligned run.

        It is the bucket's elsewhere, and for telemetry, which has means of blocks, and for random bits of weights,
        which depend on their place among blocks.
        """
        bucket = self.bucket
        asks = not self._on_triton or bucket.telemetry is not None or bucket.rounding == "stochastic"
        return bucket.level if asks else 0

    def _shared_of(self, pieces: Sequence[MatrixPiece]) -> dict[str, Any]:
        """Return options of the buckets of both stages."""
        bucket = self.bucket
        spans = [self._spans_of(piece) for piece in pieces]
        shared: dict[str, Any] = {"level": bucket.level, "keys": [bucket.keys[piece.param] for piece in pieces]}
        if bucket.is_random and any(span is not None for span in spans):
            shared["spans"] = [span or self._ends(x.param) for span, x in zip(spans, pieces, strict=True)]
        return shared

    def _first_of(self, pieces: Sequence[MatrixPiece], values: Sequence[Tensor]) -> Bucket:
        """Return the bucket of the first stage, which writes ``values``."""
        bucket, shared = self.bucket, self._shared_of(pieces)
        if bucket.whole_widths is not None:
            shared["whole_widths"] = [bucket.whole_widths[piece.param] for piece in pieces]
        moments = [piece.of(bucket.exp_avgs[piece.param]) for piece in pieces]
        scales = [self._scales_of(piece) for piece in pieces] if bucket.is_quantized else None
        return Bucket(
            values, moments, None, grad_dtype=bucket.grad_dtype, rule=bucket.rule, scales=scales, **shared
        )

    def _rows_of(self, pieces: Sequence[MatrixPiece], inputs: StepInputs) -> Tensor | None:
        """Return the sums over whole rows for the pieces' rows, or None."""
        if inputs.row_sums is None:
            return None
        sums = torch.split(inputs.row_sums, self.bucket.n_rows)
        parts = []
        for piece in pieces:
            each = len(sums[piece.param]) // len(self.bucket.params[piece.param])
            parts.append(sums[piece.param].narrow(0, piece.start * each, piece.length * each))
        return torch.cat(parts)

    def _renew_without_columns(self, inputs: StepInputs, decision: Tensor | None) -> None:
        """Update the moments of rows of which this process has no columns, with dummy matrices."""
        if inputs.row_sums is None:
            return
        bucket = self.bucket
        if self._columnless is None:
            places = [i for i, p in enumerate(bucket.params) if not p.numel() and bucket.n_rows[i]]
            index = torch.tensor(places, dtype=torch.int64, device="cpu")
            self._columnless = (
                [MatrixPiece(i, 0, len(bucket.params[i])) for i in places],
                send(index, bucket.device),
            )
        pieces, index = self._columnless
        if not pieces:
            return
        shapes = [(*bucket.params[piece.param].shape[:-1], 1) for piece in pieces]
        if self._renews is None:
            values = [torch.empty(shape, dtype=self._stage.dtype, device=bucket.device) for shape in shapes]
            self._renews = prepare(self._first_of(pieces, values), self._backend)
        grads = [torch.zeros(shape, dtype=bucket.grad_dtype, device=bucket.device) for shape in shapes]
        indices = [piece.param for piece in pieces]
        steps, hypers = inputs.steps, [inputs.hypers[i] for i in indices]
        counts = steps.index_select(0, index) if isinstance(steps, Tensor) else [steps[i] for i in indices]
        self._renews.apply(StepInputs(grads, counts, hypers, self._rows_of(pieces, inputs)), decision)

    def _is_whole(self, piece: MatrixPiece) -> bool:
        return piece.length == len(self.bucket.params[piece.param])

    def _spans_of(self, piece: MatrixPiece) -> _Spans | None:
        """Return the spans of a piece and of its moments in the whole tensor; None if it is the whole."""
        p, bucket = self.bucket.params[piece.param], self.bucket
        span: _Spans | None = None if bucket.spans is None else bucket.spans[piece.param]
        if self._is_whole(piece):
            return span
        spans = span or self._ends(piece.param)
        per_index = p[0].numel(), bucket.exp_avgs[piece.param][0].numel()
        weights, moments = (_from(x, piece.start * n) for x, n in zip(spans, per_index, strict=True))
        return weights, moments

    def _ends(self, param: int) -> _Spans:
        """Return the spans of a whole tensor and of its moments."""
        p, m = self.bucket.params[param], self.bucket.exp_avgs[param]
        whole = Span(0, p.numel(), p.numel()), Span(0, m.numel(), m.numel())
        return padded_spans(p.shape, self.bucket.level) or whole

    def _scales_of(self, piece: MatrixPiece) -> tuple[Tensor, ...] | None:
        """Return the scales of a piece's moments."""
        m, scales = self.bucket.exp_avgs[piece.param], self.bucket.scales[piece.param]
        if scales is None or piece.length == len(m):
            return scales
        size = self.bucket.stored.block_size(self.bucket.level)
        first, last = (at * m[0].numel() for at in (piece.start, piece.start + piece.length))
        return tuple(x[first // size : -(-last // size)] for x in scales)

    def _observe(self, decision: Tensor | None) -> None:
        """Add up the pieces' rows of telemetry into those of the parameters."""
        rows = self.bucket.telemetry
        assert rows is not None
        limit = COLUMNS.index("limit")
        sums = torch.zeros_like(rows)
        for batch in self._batches.values():
            if batch.rows is not None:
                sums.index_add_(0, batch.params, batch.rows)
        observed = sums[:, :limit]
        if decision is not None:  # those of the last step that was taken
            observed = torch.where(decision[1] > 0, observed, rows[:, :limit])
        rows[:, :limit] = observed
        rows[:, limit] = 1.0
        rows[:, COLUMNS.index("nonfinite")] += sums[:, COLUMNS.index("nonfinite")].clamp(max=1.0)
        rows[:, COLUMNS.index("steps")] += 1.0


def _inputs(
    batch: _Batch, grads: Sequence[Tensor], steps: Sequence[int] | Tensor, hypers: list[Hyper]
) -> StepInputs:
    """Return the inputs of a stage; counts on the device are copied, as each stage increments its own."""
    counts = steps.index_select(0, batch.params) if isinstance(steps, Tensor) else batch.of(steps)
    return StepInputs(grads, counts, hypers)


def _picker(places: Sequence[int]) -> _Of:
    """Return a function that picks the items at ``places`` from a sequence."""
    pick = itemgetter(*places, places[0])  # for a single place it would return no tuple
    return lambda values: list(pick(values)[:-1])


def _from(span: Span, offset: int) -> Span:
    """Return the span that begins at element ``offset`` of another one."""
    if span.run == span.pitch:
        return span._replace(first=span.first + offset)
    return span._replace(first=span.first + offset // span.run * span.pitch + offset % span.run)

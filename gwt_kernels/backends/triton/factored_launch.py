"""Launches for tensors whose second moment is factored: their panels, and the stages of their step."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import StepInputs
from gwt_kernels.backends.factored_bucket import FactoredBucket
from gwt_kernels.backends.triton.factors import (
    clip_kernel,
    factor_kernel,
    join_kernel,
    mean_kernel,
    panel_kernel,
    rate_kernel,
)
from gwt_kernels.backends.triton.launch import Launch, Sent
from gwt_kernels.backends.triton.moments import FACTORED
from gwt_kernels.backends.triton.schema import FACTOR_NUMBERS, PANELS, POINTERS, SCALARS
from gwt_kernels.backends.triton.step import norm_kernel
from gwt_kernels.backends.triton.tables import owners
from gwt_kernels.core.factored import Matrices
from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.level import block_width
from gwt_kernels.core.notes import COLUMNS
from gwt_kernels.rules import adafactor
from gwt_kernels.rules.adafactor import AdafactorNumbers

TILE, TILE_WIDTH, PANEL_WARPS = 2048, 512, 4  # elements per program and loop step, those of one row, and warps
ROW_CHUNK, MAX_ROW_CHUNKS = 64, 64  # least number of rows of a panel, and most panels along a matrix's rows
JOIN_BLOCK, MEAN_BLOCK, SCALAR_BLOCK = 128, 1024, 128
_pack_numbers = struct.Struct(f"{len(FACTOR_NUMBERS)}d").pack


class FactoredLaunch(Launch):
    """See :class:`gwt_kernels.backends.triton.launch.Launch`."""

    def __init__(self, bucket: FactoredBucket, chosen: list[int], flat: bool) -> None:
        super().__init__(bucket, chosen, flat)
        self._factored, self._places = bucket, chosen
        slots = {"SLOTS": FACTORED + len(bucket.moments)}
        self._path, self._step_path = self._path | slots, self._step_path | slots
        device, width = bucket.device, block_width(bucket.level, 1)
        matrices = bucket.local_matrices()
        sums = [0, *accumulate(sum(own.parts) for own in matrices)]
        own = [matrices[i] for i in chosen]
        self._tile = {"W": width, "TC": max(1, TILE_WIDTH // width)}
        self._tile["TR"] = TILE // (self._tile["TC"] * width)
        cuts = [self._cut(each) for each in own]
        panels = [each.batch * rows * columns for each, (rows, columns, _) in zip(own, cuts, strict=True)]
        self._n_panels = sum(panels)
        joins = [-(-each.batch * (each.rows + each.columns) // JOIN_BLOCK) for each in own]
        self._n_joins, self._n_matrices = sum(joins), sum(each.batch for each in own)
        gains = [0, *accumulate(each.batch * (each.rows + each.columns) for each in own)]
        self._gains = torch.zeros(gains[-1], dtype=torch.float32, device=device)
        firsts = [[0, *accumulate(counts)] for counts in (panels, joins, [each.batch for each in own])]
        self._n_parts = 0
        rows, records = [], []
        first_gain = self._gains.data_ptr()
        for k, (i, each, (row_chunks, col_chunks, chunk_rows)) in enumerate(zip(chosen, own, cuts, strict=True)):
            row, col = bucket.factors[i]
            n_rows = each.batch * each.rows
            numbers = {
                "first_program": firsts[0][k],
                "rows": each.rows,
                "columns": each.columns,
                "width": bucket.params[i].shape[-1] if bucket.params[i].dim() else 1,
                "row_chunks": row_chunks,
                "col_chunks": col_chunks,
                "chunk_rows": chunk_rows,
                "row_parts": self._take(n_rows * col_chunks),
                "col_parts": self._take(each.batch * each.columns * row_chunks),
                "weight_parts": self._take(panels[k]),
                "first_block": firsts[1][k],
                "matrices": each.batch,
                "first_matrix": firsts[2][k],
                "sums": sums[i],
                "row": 0 if row is None else row.data_ptr(),
                "col": col.data_ptr(),
                "row_gains": gains[k],
                "col_gains": gains[k] + n_rows,
            }
            rows.append([numbers[name] for name in PANELS])
            records.append(
                [first_gain + 4 * gains[k], first_gain + 4 * (gains[k] + n_rows), each.rows, each.columns]
            )
        send = self._sender.send
        self._panels = send(array("q", chain(*rows)).tobytes(), device)
        self._records = send(array("q", chain(*records)).tobytes(), device)
        counts = (panels, joins, [each.batch for each in own])
        self._panel_owners, self._join_owners, self._matrix_owners = (
            owners(send(array("q", each).tobytes(), device), sum(each)) for each in counts
        )
        widths = [numbers[PANELS.index("width")] for numbers in rows]
        self._rows_alignment = {"ALIGN": self._step_alignment["ALIGN"], "MULTIPLE": 1}
        if flat and not any(n % 8 for n in widths):
            self._rows_alignment["MULTIPLE"] = 8
        self._numbers_of: list[AdafactorNumbers] = []

    def set_pointers(self, columns: Mapping[str, bytes]) -> None:
        """See :class:`gwt_kernels.backends.triton.launch.Launch`; records replace second moments."""
        super().set_pointers(columns)
        first, size = self._records.data_ptr(), 8 * (len(self._records) // self.n)
        self._columns["v"] = array("q", range(first, first + size * self.n, size)).tobytes()

    def send(self, grad_ptrs: bytes, inputs: StepInputs, decision: Tensor | None, counts: bool) -> Sent:
        """See :class:`gwt_kernels.backends.triton.launch.Launch`."""
        sent = super().send(grad_ptrs, inputs, decision, counts)
        self._renew_numbers(inputs.hypers)
        if isinstance(inputs.steps, Tensor):
            steps = sent.pointers[POINTERS.index("step") * self.n :]
            self._run(
                rate_kernel, -(-self.n // SCALAR_BLOCK), self._numbers, steps, sent.scalars, self.n,
                BLOCK=SCALAR_BLOCK,
            )  # fmt: skip
        return sent

    def memory(self) -> list[Tensor]:
        """See :class:`gwt_kernels.backends.triton.launch.Launch`."""
        return [self._numbers]

    def add_panels(self, sent: Sent, sums: Tensor, weighted: bool) -> None:
        """Add up squares over rows and columns, and of weights if ``weighted``, in ``sums`` of the bucket."""
        bucket, device = self._bucket, sums.device
        p, g, _ = self._dtypes
        parts = torch.empty(self._n_parts, dtype=torch.float32, device=device)
        self._run(
            panel_kernel, self._n_panels, self._panel_owners, self._panels, sent.pointers, sent.scalars, parts,
            self.n, P=p, G=g, WEIGHTED=weighted, ROUNDING=bucket.rounding, CAN_SKIP=sent.can_skip,
            num_warps=PANEL_WARPS, **self._tile, **self._rows_alignment,
        )  # fmt: skip
        self._run(
            join_kernel, self._n_joins, self._join_owners, self._panels, sent.scalars, parts, sums,
            BLOCK=JOIN_BLOCK, CAN_SKIP=sent.can_skip,
        )  # fmt: skip
        self._run(
            mean_kernel, self._n_matrices, self._matrix_owners, self._panels, sent.scalars, self._numbers, parts,
            sums, BLOCK=MEAN_BLOCK, WEIGHTED=weighted, CAN_SKIP=sent.can_skip,
        )  # fmt: skip

    def measure(self, sent: Sent, sums: Tensor, squares: Tensor) -> None:
        """Update the factors, and add up squares of the approximation's update in ``squares`` of the bucket."""
        self._run(
            factor_kernel, self._n_joins, self._join_owners, self._panels, sent.scalars, self._numbers, sums,
            self._gains, BLOCK=JOIN_BLOCK, CAN_SKIP=sent.can_skip,
        )  # fmt: skip
        _, g, m = self._dtypes
        sent.partials = torch.empty(self.n_chunks, dtype=torch.float32, device=sums.device)
        self._run(
            norm_kernel, self.n_chunks, self._chunk_owners, self._layout, sent.pointers, sent.scalars,
            self._first_chunks, sent.partials, sent.scalars, self.n, self.tiles_per_chunk, self.n_chunks, G=g, M=m,
            CAN_SKIP=sent.can_skip, COLLECT_GRAD_STATS=False, DIRECTION=adafactor.kernel_direction,
            **(self._path | {"MOMENTS": adafactor.kernel_measured, "SLOTS": FACTORED, "Q": 0}),
            **self._norm_alignment,
        )  # fmt: skip
        self.add_up(sent, squares)

    def finish(self, sent: Sent, sums: Tensor, squares: Tensor, weighted: bool) -> None:
        """Clip the update, and apply it."""
        own = squares if self._index is None else squares[self._index]
        sent.factors = torch.empty(self.n, dtype=torch.float32, device=sums.device)
        self._run(
            clip_kernel, -(-self.n // SCALAR_BLOCK), self._panels, self._numbers, sent.scalars, sums, own,
            sent.factors, self.n, BLOCK=SCALAR_BLOCK, WEIGHTED=weighted,
        )  # fmt: skip
        self.update(sent, None)
        if self._bucket.telemetry is not None:  # the clip in place of the limiter's divisor
            taken = sent.scalars.view(self.n, -1)[:, SCALARS.index("taken")] != 0
            told = self._bucket.telemetry[:, COLUMNS.index("limit")]
            before = told if self._index is None else told[self._index]
            clips = torch.where(taken, sent.factors.double().reciprocal(), before)
            told[slice(None) if self._index is None else self._index] = clips

    def _run(self, kernel: Any, programs: int, *arguments: Tensor | int | None, **constants: Any) -> None:
        """Launch a kernel."""
        launch, rest = self._ready(kernel, programs, **constants)
        launch(*arguments, *rest)

    def _cut(self, own: Matrices) -> tuple[int, int, int]:
        """Return the numbers of panels along a matrix's rows and columns, and the rows of a panel."""
        step = self._tile["TR"]
        chunk = max(ROW_CHUNK, -(-own.rows // MAX_ROW_CHUNKS))
        chunk = -(-chunk // step) * step
        return -(-own.rows // chunk), -(-own.columns // self._tile["TC"]), chunk

    def _take(self, n: int) -> int:
        """Reserve ``n`` numbers of the workspace, and return the index of the first."""
        first, self._n_parts = self._n_parts, self._n_parts + n
        return first

    def _renew_numbers(self, hypers: Sequence[Hyper]) -> None:
        """Send the numbers that depend on options only, if these changed."""
        own = [hypers[i].rule_options for i in self._places]
        if own == self._numbers_of:
            return
        rows = []
        for i, each in zip(self._places, own, strict=True):
            whole = self._factored.matrices[i]
            numbers = {
                "eps": each.eps,
                "clip_threshold": each.clip_threshold,
                "least_rms": -1.0 if each.least_rms is None else each.least_rms,
                "decay_rate": each.decay_rate,
                "largest_rate": each.largest_rate or 0.0,
                "rate_grows": each.rate_grows,
                "whole_rows": whole.rows,
                "whole_columns": whole.columns,
                "whole_moments": whole.numel,
                "whole_weights": self._factored.numels[i],
            }
            rows.append(_pack_numbers(*map(numbers.__getitem__, FACTOR_NUMBERS)))
        sent = self._sender.send(b"".join(rows), self._bucket.device)
        self._numbers, self._numbers_of = sent.view(torch.float64), own

"""Sums over the parts of rows that a process holds, of all tensors of a bucket in one launch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.backends.bucket import Bucket
from gwt_kernels.backends.triton.compiling import UNFUSED
from gwt_kernels.backends.triton.layout import row_variant
from gwt_kernels.backends.triton.tables import TRITON_DTYPES, Sender, addresses, device_guard, misalignments, owners
from gwt_kernels.backends.triton.whole_rows import row_sums_kernel
from gwt_kernels.core.level import ROW


class RowSummer:
    """Adds up the rows of a bucket's gradients, as :func:`gwt_kernels.backends.torch.row_sums.row_sums` does.

    Args:
        bucket: A bucket of parts of rows.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._n = bucket, sum(bucket.n_rows)
        widths = [p.shape[-1] if p.dim() else 1 for p in bucket.params]
        self._in_eights = not any(width % 8 for width in widths)
        layout = array("q", chain(*zip(accumulate(bucket.n_rows, initial=0), widths, strict=False)))
        self._sender = Sender()
        self._layout = self._sender.send(layout.tobytes(), bucket.device)
        self._owners = owners(self._sender.send(array("q", bucket.n_rows).tobytes(), bucket.device), self._n)
        made: dict[str, Any] = row_variant(max(widths), bucket.level, flat=False)
        del made["FLAT"]
        self._size = {"W": 1, "NB": made.pop("TILE")} | made if bucket.level == ROW else made

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """See :func:`gwt_kernels.backends.torch.row_sums.row_sums`."""
        bucket = self._bucket
        grads = [g.resolve_neg().contiguous() for g in grads]
        words = addresses(grads)
        sums = torch.empty(self._n, bucket.row_numbers, dtype=torch.float32, device=bucket.device)
        sent = self._sender.send(words + bytes(-len(words) % 16), bucket.device, capturable=True)
        if self._n:
            with device_guard(bucket.device):
                row_sums_kernel[(self._n,)](
                    self._owners, self._layout, sent, sums, G=TRITON_DTYPES[bucket.grad_dtype],
                    BY_BLOCKS=bucket.level != ROW, NUMBERS=bucket.row_numbers,
                    FLAT=self._in_eights and not any(misalignments(words)), **self._size, **UNFUSED,
                )  # fmt: skip
        return sums

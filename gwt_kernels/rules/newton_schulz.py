"""Newton-Schulz: the iteration that brings a matrix's singular values near one, on batches in bounded memory.

For a matrix ``X`` with at most as many rows as columns (others are transposed), with the order of operations of
``torch.optim.Muon``::

    X = X / max(norm(X), eps)
    G = X @ X^T;  X = a*X + (b*G + c*G@G) @ X            `steps` times
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 256 << 20
"""Default of the option ``workspace_bytes``."""

LARGE = 1 << 16
"""Elements of a matrix from which, on a CPU, products of one matrix at a time are faster than those of a batch."""

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral_unclamped": lambda rows, cols: math.sqrt(rows / cols),
}
"""Factors on the learning rate in ``torch.optim.Muon`` (PyTorch 2.14), by ``adjust_lr_fn``."""

# The iteration ---------------------------------------------------------------------------------------------


class NewtonSchulz(NamedTuple):
    """The quintic iteration and the dtype that it is computed in.

    Attributes:
        coefficients: ``a, b, c``: the option ``ns_coefficients``.
        steps: Number of iterations, less than 100: ``ns_steps``.
        eps: The smallest norm that a matrix is divided by.
        dtype: bfloat16, float32 or float64: ``ns_dtype``.
    """

    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    steps: int = 5
    eps: float = 1e-7
    dtype: torch.dtype = torch.bfloat16

    def check(self) -> None:
        """Raise a TypeError or ValueError that names the first invalid option."""
        numbers = self.coefficients
        if not isinstance(numbers, (tuple, list)) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise ValueError(f"ns_coefficients={numbers!r} must be a tuple of exactly 3 finite numbers")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"ns_steps={self.steps!r} must be an int")
        if not 0 <= self.steps < 100:
            raise ValueError(f"ns_steps={self.steps} must be at least 0 and less than 100")
        if not _is_number(self.eps) or self.eps < 0:
            raise ValueError(f"eps={self.eps!r} must be a finite number that is not negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"ns_dtype={self.dtype!r} must be one of {', '.join(map(str, DTYPES))}")

    def __call__(self, x: Tensor) -> Tensor:
        """Return the matrices ``x [..., rows, cols]`` after the iteration, as a new tensor of :attr:`dtype`."""
        with torch.no_grad():
            result = x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
            if x.numel():
                self.update_(result.view(-1, *x.shape[-2:]))
        return result

    def temporary_bytes(self, rows: int, cols: int, copied: bool = False) -> int:
        """Return the bytes of temporaries of :meth:`update_` per matrix, with a copy of it if ``copied``."""
        small = min(rows, cols)
        elements = (1 + copied) * rows * cols + 2 * small * small
        return elements * self.dtype.itemsize

    def work(self, rows: int, cols: int) -> int:
        """Return an estimate of one matrix's time, by which matrices are distributed over processes."""
        return rows * cols * min(rows, cols) * max(self.steps, 1)

    def flops(self, rows: int, cols: int) -> int:
        """Return the floating-point operations of one matrix's products; a multiply-add counts as two."""
        small, large = min(rows, cols), max(rows, cols)
        return self.steps * 2 * small * small * (2 * large + small)

    def update_(self, x: Tensor) -> None:
        """Replace contiguous matrices ``x [n, rows, cols]`` of :attr:`dtype` by the result of the iteration."""
        n, rows, cols = x.shape
        small, large = min(rows, cols), max(rows, cols)
        a, b, c = self.coefficients
        x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=self.eps))
        # A single matrix uses torch.optim.Muon's own products, of two dimensions.
        batch = () if n == 1 else (n,)
        multiply, add_product = (torch.mm, torch.addmm) if n == 1 else (torch.bmm, torch.baddbmm)
        gram, update = x.new_empty(*batch, small, small), x.new_empty(*batch, small, small)
        buffers = x.new_empty(*batch, small, large), x.view(*batch, small, large)
        x = x.view(*batch, rows, cols)
        now = x.mT if rows > cols else x
        for step in range(self.steps):
            multiply(now, now.mT, out=gram)
            add_product(gram, gram, gram, beta=b, alpha=c, out=update)
            now = add_product(now, update, now, beta=a, out=buffers[step % 2])
        if self.steps % 2:
            x.copy_(now.mT if rows > cols else now)
        elif self.steps and rows > cols:  # the result lies transposed in the memory of x
            x.copy_(buffers[0].view(x.shape).copy_(now.mT))


@torch.no_grad()
def orthogonalize_(
    matrices: Sequence[Tensor], newton_schulz: NewtonSchulz, workspace_bytes: int = WORKSPACE_BYTES
) -> None:
    """Replace matrices by the iteration's results; matrices of one shape are computed in batches.

    Matrices of the iteration's dtype that lie end to end in memory are a batch as they are; others are copied
    into one. The result of a matrix alone in its batch equals ``torch.optim.Muon``'s to the bit. Larger batches
    use the library's batched products. On a CPU these give the same bits, except for products of fewer than 400
    multiplications, which PyTorch computes itself; on other devices they may not.

    Args:
        matrices: Tensors ``[..., rows, cols]``; all dimensions before the last two are batch dimensions.
        newton_schulz: The iteration.
        workspace_bytes: Largest size of all temporaries together.

    Raises:
        ValueError: one matrix alone needs more than ``workspace_bytes``.
    """
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for x in matrices:
        if x.numel():
            batch = x.view(-1, *x.shape[-2:])
            apart = [batch] if batch.is_contiguous() else batch.split(1)
            groups.setdefault((x.device, x.dtype, *x.shape[-2:]), []).extend(apart)
    for group in groups.values():
        _orthogonalize_group(group, newton_schulz, workspace_bytes)


def _orthogonalize_group(group: list[Tensor], newton_schulz: NewtonSchulz, workspace_bytes: int) -> None:
    """Apply :func:`orthogonalize_` to batches ``[n, rows, cols]`` of one matrix shape, dtype and device."""
    rows, cols = group[0].shape[1:]
    place = f"matrices of shape ({rows}, {cols})"
    copies_at_once = workspace_bytes // newton_schulz.temporary_bytes(rows, cols, copied=True)
    enough = min(sum(map(len, group)), max(copies_at_once, 1))
    loose: list[Tensor] = []
    for run in _end_to_end(group):
        if run.dtype != newton_schulz.dtype or not run.is_contiguous() or len(run) < enough:
            loose += run.unbind()
            continue
        needed = newton_schulz.temporary_bytes(rows, cols)
        _check_bytes(needed, workspace_bytes, place, newton_schulz.dtype)
        by_itself = run.device.type == "cpu" and rows * cols >= LARGE
        for batch in run.split(1 if by_itself else workspace_bytes // needed):
            newton_schulz.update_(batch)
    if loose:
        needed = newton_schulz.temporary_bytes(rows, cols, copied=True)
        _check_bytes(needed, workspace_bytes, place, newton_schulz.dtype)
    for i in range(0, len(loose), max(copies_at_once, 1)):
        some = loose[i : i + copies_at_once]
        stack = torch.empty(len(some), rows, cols, dtype=newton_schulz.dtype, device=some[0].device)
        torch._foreach_copy_(stack.unbind(), some)
        newton_schulz.update_(stack)
        torch._foreach_copy_(some, stack.unbind())


def _end_to_end(group: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the batches, with those that follow one another in memory joined to one."""
    run = group[0]
    for x in group[1:]:
        follows = x.storage_offset() == run.storage_offset() + run.numel()
        same = x.untyped_storage()._cdata == run.untyped_storage()._cdata
        if follows and same and run.is_contiguous() and x.is_contiguous():
            rows, cols = x.shape[1:]
            run = run.as_strided((len(run) + len(x), rows, cols), (rows * cols, cols, 1))
        else:
            yield run
            run = x
    yield run


# The matrices of a parameter -------------------------------------------------------------------------------


def matrix_shapes(
    shape: Sequence[int], flatten: bool = False, row_splits: Sequence[int] | None = None, name: str = "a tensor"
) -> list[tuple[int, ...]]:
    """Return the shapes of :func:`views_of` for a tensor of ``shape``: ``(rows, cols)``, or ``(n, rows, cols)``.

    Raises:
        TypeError: ``flatten`` or ``row_splits`` has the wrong type.
        ValueError: the tensor has fewer than two dimensions, or ``row_splits`` does not add up to its rows.
    """
    if not isinstance(flatten, bool):
        raise TypeError(f"flatten={flatten!r} must be True or False")
    if len(shape) < 2:
        raise ValueError(
            f"{name} of shape {tuple(shape)} is no matrix, which Newton-Schulz needs: put it into a group with "
            f"rule='adamw'"
        )
    if flatten:
        shape = shape[0], math.prod(shape[1:])
    batch = (math.prod(shape[:-2]),) if len(shape) > 2 else ()
    rows, cols = shape[-2:]
    if row_splits is None:
        return [(*batch, rows, cols)]
    if not isinstance(row_splits, (tuple, list)):
        raise TypeError(f"row_splits={row_splits!r} must be a tuple of numbers of rows, or None")
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in row_splits):
        raise TypeError(f"row_splits={row_splits!r} must hold numbers of rows, which are ints")
    if any(n <= 0 for n in row_splits) or sum(row_splits) != rows:
        transposed = (
            ", which are its columns: a weight stored as [inputs, outputs], such as GPT-2's Conv1D, is not split; "
            "put it into a group with row_splits=None"
        )
        raise ValueError(
            f"row_splits={tuple(row_splits)!r} must be positive and add up to the {rows} rows of {name} of shape "
            f"{tuple(shape)}, not to {sum(row_splits)}{transposed if sum(row_splits) == cols else ''}"
        )
    return [(*batch, n, cols) for n in row_splits]


def views_of(x: Tensor, flatten: bool = False, row_splits: Sequence[int] | None = None) -> list[Tensor]:
    """Return views of the matrices that are orthogonalised separately: ``[rows, cols]``, or ``[n, rows, cols]``.

    Args:
        x: A contiguous tensor of a parameter's shape. Dimensions before the last two are batch dimensions.
        flatten: View ``x`` as ``[x.shape[0], -1]``, as for a convolution, and not as a batch.
        row_splits: Numbers of rows to cut each matrix into, as for fused queries, keys and values.

    Raises:
        TypeError, ValueError: as :func:`matrix_shapes`.
    """
    shapes = matrix_shapes(x.shape, flatten, row_splits)
    rows, cols = sum(s[-2] for s in shapes), shapes[0][-1]
    whole = x.view(*shapes[0][:-2], rows, cols)
    return [whole] if row_splits is None else list(whole.split(list(row_splits), dim=-2))


def update_scale(adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """Return the factor on the learning rate in ``torch.optim.Muon``, for a matrix of ``shape[-2:]``.

    Args:
        adjust_lr_fn: A key of :data:`ADJUSTMENTS`; None for ``"original"``.
        shape: One of :func:`matrix_shapes`.

    Raises:
        ValueError: ``adjust_lr_fn`` is unknown.
    """
    name = "original" if adjust_lr_fn is None else adjust_lr_fn
    if not isinstance(name, str) or name not in ADJUSTMENTS:
        known = ", ".join(map(repr, ADJUSTMENTS))
        raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} must be None or one of {known}")
    rows, cols = shape[-2:]
    return ADJUSTMENTS[name](rows, cols) if cols else 1.0


# What fits -------------------------------------------------------------------------------------------------


def workspace_needed(shapes: Sequence[Sequence[int]], newton_schulz: NewtonSchulz) -> int:
    """Return the fewest bytes for matrices of these shapes: the matrices, and temporaries for the largest."""
    shapes = [s for s in shapes if math.prod(s)]
    matrix_bytes = sum(map(math.prod, shapes)) * newton_schulz.dtype.itemsize
    return matrix_bytes + max((newton_schulz.temporary_bytes(s[-2], s[-1]) for s in shapes), default=0)


def check_workspace(
    name: str,
    shape: Sequence[int],
    newton_schulz: NewtonSchulz,
    workspace_bytes: int = WORKSPACE_BYTES,
    flatten: bool = False,
    row_splits: Sequence[int] | None = None,
) -> None:
    """Raise unless the matrices of a parameter fit into ``workspace_bytes`` one at a time.

    One at a time is a whole matrix, before ``row_splits``; in a batch, all matrices at one index of the first
    dimension.

    Raises:
        TypeError: ``workspace_bytes`` is not an int; or as :func:`matrix_shapes`.
        ValueError: the matrix needs more; or as :func:`matrix_shapes`.
    """
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes={workspace_bytes!r} must be an int")
    shapes = matrix_shapes(shape, flatten, row_splits, name)
    if len(shapes[0]) > 2:
        shapes = matrix_shapes(shape[1:], False, row_splits, name)
    needed = workspace_needed(shapes, newton_schulz)
    _check_bytes(needed, workspace_bytes, f"{name} of shape {tuple(shape)}", newton_schulz.dtype)


def _check_bytes(needed: int, workspace_bytes: int, what: str, dtype: torch.dtype) -> None:
    if needed > workspace_bytes:
        cheaper = " or ns_dtype=torch.bfloat16" if dtype != torch.bfloat16 else ""
        raise ValueError(
            f"{what} needs {needed} bytes of workspace, and may take workspace_bytes={workspace_bytes}: use at "
            f"least workspace_bytes={needed}{cheaper}, or put it into a group with rule='adamw'"
        )


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

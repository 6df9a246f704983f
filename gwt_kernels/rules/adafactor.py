"""Adafactor (arXiv 1804.04235) on each gradient's approximation; details as GWT's authors publish them, or divided.

The second moment of a matrix is kept as two factors, means of rows and of columns. For a block of ``W = 2**level``
neighbours with mean ``mean``, in row ``i`` and column ``k`` of the approximation, at step ``t``::

    A = sqrt(W) * mean                                b2 = 1 - t**decay_rate
    R_i = b2*R_i + (1-b2)*(mean_k(A*A) + eps1)        C_k = b2*C_k + (1-b2)*(mean_i(A*A) + eps1)
    d = sqrt(R_i / mean_i(R)) * sqrt(C_k)             clip = max(1, rms(A/d) / clip_threshold)
    m = b1*m + (1-b1)*A/(d*clip)                      without beta1: m = A/(d*clip)
    u_j = r_j/(d*clip) + m/sqrt(W)                    details="published": u_j = r_j + m/sqrt(W)

with ``r_j = g_j - mean``. A tensor of one dimension is a matrix of one row, which needs no ``R``. ``clip`` is one
number for the whole tensor. Level 0 is Adafactor, without ``scale``. There is neither limiter nor bias correction.
In place of a second moment, the PyTorch statements take the denominators ``d*clip``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.hyper import Hyper
from gwt_kernels.core.kernel import statement
from gwt_kernels.rules.blocks import block_sums, pad_to_blocks, width_of
from gwt_kernels.rules.rule import Context, Rule

if TYPE_CHECKING:
    import triton.language as tl


class AdafactorNumbers(NamedTuple):
    """Options of a step that only Adafactor has: ``Hyper.rule_options``.

    Attributes:
        eps: Number added to the squares of the approximation.
        least_rms: Lower bound of the weights' RMS, which multiplies the learning rate; None if it does not.
        clip_threshold: RMS of the approximation's update above which it is clipped.
        decay_rate: The second moment's decay at step ``t`` is ``1 - t**decay_rate``.
        largest_rate: The learning rate of a relative step is ``min(largest_rate, 1 / sqrt(t))``; None for ``lr``.
        rate_grows: Whether ``largest_rate`` is multiplied by ``t``.
        divides_details: Whether details are divided as the approximation is.
    """

    eps: float = 1e-30
    least_rms: float | None = None
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    largest_rate: float | None = None
    rate_grows: bool = False
    divides_details: bool = True

    def rest2(self, step: int) -> float:
        """Return the weight of this step's squares in the second moment, ``1 - b2``."""
        return float(float(step) ** self.decay_rate)

    def rate(self, hyper: Hyper, step: int) -> float:
        """Return the learning rate of a step, before it is multiplied by the weights' RMS."""
        if self.largest_rate is None:
            return float(hyper.lr)
        return min(self.largest_rate * (step if self.rate_grows else 1), 1 / math.sqrt(max(step, 1)))


# In PyTorch ------------------------------------------------------------------------------------------------


def _moments(g: Tensor, m: Tensor | None, v: Tensor, context: Context) -> tuple[Tensor, ...]:
    """Return the approximation's update, the means of blocks, and the denominators ``v``, which are ``d*clip``."""
    hyper, level, notes, _ = context
    width = width_of(g, level)
    if level:
        mean = block_sums(g.to(v.dtype), level).mul_(hyper.signed_factor / width)
    else:
        mean = hyper.scaled(g.to(v.dtype))
    if notes is not None:
        notes.gradient(g, hyper.signed_factor, mean, width)
    u = (mean * math.sqrt(width) if level else mean) / v
    if m is not None:
        u = m.mul_(hyper.beta1).add_(u, alpha=1 - hyper.beta1)
    return u, mean, v


def _update(p: Tensor, g: Tensor, parts: tuple[Tensor, ...], step_size: Tensor | float, context: Context) -> None:
    """Compute ``p_j -= gain_k * g_j + offset_k`` for element ``j`` of block ``k``."""
    (u, mean, v), (hyper, level, notes, _) = parts, context
    if level:
        width = width_of(g, level)
        gain = step_size / v if hyper.rule_options.divides_details else step_size * torch.ones_like(v)
        offset = (u * (step_size / math.sqrt(width))).addcmul_(mean, gain, value=-1)
        blocks = pad_to_blocks(g.to(v.dtype), level)
        shape = blocks.shape
        blocks = blocks.reshape(*mean.shape, width)
        gain.mul_(hyper.signed_factor)
        update = torch.addcmul(offset.unsqueeze(-1), blocks, gain.unsqueeze(-1)).view(shape)[..., : p.shape[-1]]
        p.sub_(update)
    elif isinstance(step_size, Tensor) or notes is not None:
        update = u * step_size
        p.sub_(update)
    else:
        p.sub_(u, alpha=step_size)
    if notes is not None:
        notes.update(update)


# In Triton: see :class:`gwt_kernels.rules.rule.Kernel` ---------------------------------------------------------
# Here ``v`` is ``1 / d``. ``numbers`` has ``1 / clip`` in place of ``eps``, and in place of ``detail_scale`` 1 if
# details are divided, else 0.


@statement
def kernel_moments(mean, square, m, v, numbers, root):
    b1, rest1, _, _, clip, _ = numbers
    gain = v * clip
    return b1 * m + rest1 * (mean * root * gain), gain


@statement
def kernel_update(g, residual, m, v, step_size, numbers, per_root):
    gain = tl.where(numbers[5] != 0.0, v, 1.0)
    return (residual * gain[:, None] + (m * per_root)[:, None]) * step_size


@statement
def kernel_measured(mean, square, m, v, numbers, root):
    """Return ``A / d`` in place of the first moment, and ``v``."""
    return mean * root * v, v


@statement
def kernel_direction(m, v, numbers):
    return m


_STATED: Any = {
    "module": __name__,
    "moments": _moments,
    "update_": _update,
    "slots": ("exp_avg",),
    "corrects_bias": False,
    "is_literal": True,
    "is_factored": True,
}
ADAFACTOR = Rule("adafactor", plain=Rule("adafactor", is_scaled=False, **_STATED), **_STATED)

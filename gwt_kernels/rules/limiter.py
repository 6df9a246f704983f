"""Fira's norm-growth limiter (arXiv 2410.01623), as arXiv 2501.07237 uses it: one divisor for a tensor's update::

    limit = max(n / (n_prev + 1e-8), gamma) / gamma        1 if n_prev is 0: no norm yet
    n_prev = n / limit

with ``n`` the norm of the update's approximation, :attr:`gwt_kernels.rules.Rule.direction`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def limit_(previous: Tensor, norm: Tensor, gamma: float | Tensor) -> Tensor:
    """Return the limiter's divisor of the update, and replace ``previous``, without waiting for the device."""
    growth = norm / (previous + 1e-8)
    limit = torch.where(previous == 0, torch.ones_like(growth), growth.clamp(min=gamma) / gamma)
    previous.copy_(norm / limit)
    return limit

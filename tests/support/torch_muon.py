"""Adjustments of the rate in the installed ``torch.optim.Muon``: PyTorch 2.14 has one that 2.13 lacks."""

from __future__ import annotations

import torch

from tests.support.reference_optimizers import ADJUSTMENTS as OWN


def _is_known(name: str) -> bool:
    try:
        torch.optim.Muon([torch.nn.Parameter(torch.zeros(1, 1))], adjust_lr_fn=name)
    except ValueError:
        return False
    return True


ADJUSTMENTS = tuple(name for name in OWN if _is_known(name))

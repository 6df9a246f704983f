"""Telemetry of an optimizer's steps, per tensor.

A step writes a row of six float64 numbers per tensor on its device:

    0  sum of squares of the gradient's details        ``sum (g - mean)**2``, after clipping
    1  sum of squares of its approximation             ``W * sum mean**2``
    2  sum of squares of the update                    with learning rate and limiter, without weight decay
    3  the limiter's divisor                           1 if it did not limit, or there is none
    4  number of steps whose gradient was not finite   or that were skipped
    5  number of steps

With ``rule="muon"`` the first two are of the orthogonalised matrix, which replaces the gradient in that pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gwt_kernels.core.notes import COLUMNS
from gwt_kernels.optim.checks import names_of


def joined(known: dict[Tensor, Tensor], params: Sequence[Tensor]) -> Tensor:
    """Join the rows of these parameters in one tensor ``[n, 6]``, and store views of it in ``known``.

    Values of known rows are kept; a tensor without steps gets a new row.
    """
    rows = torch.stack([known[p] if p in known else _new_row(p.device) for p in params])
    known.update(zip(params, rows.unbind(), strict=True))
    return rows


def named(rows: Mapping[Tensor, Tensor], groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Tensor, int]]:
    """Return the input of :func:`read`, by parameter name, or by indices in the groups such as ``"0.3"``."""
    found = {}
    for i, group in enumerate(groups):
        names = names_of(group) or [f"{i}.{k}" for k in range(len(group["params"]))]
        found.update(
            {name: (rows[p], p.numel()) for name, p in zip(names, group["params"], strict=True) if p in rows}
        )
    return found


def read(rows: Mapping[str, tuple[Tensor, int]]) -> dict[str, dict[str, float]]:
    """Return the scalars to log, by parameter; the host waits for one copy from each device.

    Args:
        rows: Each tensor's row and number of elements, by its name.

    Returns:
        For each name ``detail_energy``, the fraction of the gradient's energy in the details (0 for a zero
        gradient), which under ``rule="muon"`` is that of the orthogonalised matrix; ``update_rms``, the root of
        the update's mean square; ``limiter``, the limiter's divisor; and ``nonfinite``, the fraction of steps
        whose gradient was not finite or that were skipped.
    """
    by_device: dict[torch.device, list[str]] = {}
    for name, (row, _) in rows.items():
        by_device.setdefault(row.device, []).append(name)
    found = {}
    for names in by_device.values():
        for name, numbers in zip(names, torch.stack([rows[name][0] for name in names]).tolist(), strict=True):
            details, approximation, update, limit, nonfinite, steps = numbers
            energy = details + approximation
            found[name] = {
                "detail_energy": details / energy if energy else 0.0,
                "update_rms": math.sqrt(update / max(rows[name][1], 1)),
                "limiter": limit,
                "nonfinite": nonfinite / max(steps, 1.0),
            }
    return {name: found[name] for name in rows}


def _new_row(device: torch.device) -> Tensor:
    row = torch.zeros(len(COLUMNS), dtype=torch.float64, device=device)
    row[COLUMNS.index("limit")].fill_(1.0)
    return row

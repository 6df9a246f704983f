"""Candidates with other rules than Adam's: Muon and Adafactor from torch; Muon, Adafactor and Lion from here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from bench.optimizers.candidate import Candidate, Group, Likeness
from gwt_kernels import GWTAdafactor, GWTLion, GWTMuon

NAME = "rules"
"""Name of these candidates among the packages of `--peers`."""

CLOSE = Likeness(0.999, 0.99, 1.01)
NARROW = Likeness(0.99, 0.97, 1.03)
"""For Newton-Schulz in bfloat16, and for rules where the sign of a sum near 0 may differ."""


class MuonAndAdamW(Optimizer):
    """`torch.optim.Muon` for the transformed matrices, and fused AdamW for tensors that Muon does not take."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 1e-3})
        kinds: list[tuple[Callable[..., Optimizer], bool]] = [(Muon, True), (partial(AdamW, fused=True), False)]
        own = [(kind, [group for group in self.param_groups if group["transformed"] == of]) for kind, of in kinds]
        self._parts = [kind(chosen, lr=1e-3) for kind, chosen in own if chosen]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def suite(dtype: torch.dtype, levels: list[int]) -> list[Candidate]:
    """Return torch's Muon and Adafactor, and this package's rules at level 2, or else at the requested levels.

    GWTMuon also comes at level 0, where it is Muon.
    """
    chosen = [2] if 2 in levels else [level for level in levels if level]

    def muon(level: int, **options: Any) -> Callable[[list[Group]], Optimizer]:
        return lambda groups: GWTMuon(_with_rules(groups, level), level=level, **options)

    def own(kind: type[Optimizer], level: int, likeness: Likeness) -> Candidate:
        def build(groups: list[Group], **options: Any) -> Optimizer:
            return kind(groups, level=level, **options)  # type: ignore[call-arg]

        return _candidate(
            f"{kind.__name__} level {level}", dtype, level, build, likeness, partial(build, backend="torch")
        )

    exact = {"backend": "torch", "ns_dtype": torch.float64}
    found = [_candidate("Muon and AdamW(fused=True)", dtype, None, MuonAndAdamW, NARROW, muon(0, **exact))]
    for level in (0, *chosen):
        kept = (None, torch.int8) if level == 0 else (None, torch.bfloat16, torch.int8)
        for moments in kept:
            words = f", {str(moments).removeprefix('torch.')} moments" if moments else ""
            name = f"GWTMuon level {level}{words}"
            build = muon(level, state_dtype=moments)
            found.append(_candidate(name, dtype, level, build, NARROW, muon(level, **exact)))
    found.append(_candidate("Adafactor(foreach=True)", dtype, None, _adafactor, CLOSE, _adafactor))
    found += [own(GWTAdafactor, level, CLOSE) for level in chosen]
    return found + [own(GWTLion, level, NARROW) for level in chosen]


def _adafactor(groups: list[Group]) -> Optimizer:
    return Adafactor(groups, foreach=True)


def _with_rules(groups: list[Group], level: int) -> list[Group]:
    """Return the groups with their levels; those that are not transformed get level 0 and AdamW's rule."""
    return [
        group | ({"level": level} if group["transformed"] else {"level": 0, "rule": "adamw"}) for group in groups
    ]


def _candidate(
    name: str,
    dtype: torch.dtype,
    level: int | None,
    build: Callable[[list[Group]], Optimizer],
    likeness: Likeness,
    resembles: Callable[[list[Group]], Optimizer],
) -> Candidate:
    return Candidate(name, dtype, level, False, build, None, NAME, likeness, resembles=resembles)

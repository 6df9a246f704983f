"""README's table for the choice of an optimizer: state, loss and step time of each, from the records."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.report import optimizers
from bench.report.comparisons import Comparison
from bench.report.markdown import count, model_name, number, setting, table
from bench.report.rows import Case, Run, of
from bench.report.tradeoff import PRESET, points
from gwt_kernels.plan import plan

__all__ = ["block"]

FUSED = "AdamW(fused=True)"
WIDTH = 4096  # of the matrix whose state is counted: whole blocks and whole quantization blocks at every level


class Choice(NamedTuple):
    """A row of the table."""

    wanted: str
    taken: str
    rule: str
    level: int
    moments: torch.dtype | None
    """None for the optimizer's default, float32."""
    compared: str
    """Its name in the comparisons of quality."""
    timed: str
    """Its name among the timed optimizers."""


CHOICES = (
    Choice("the lowest loss", "`GWTMuon(level=0)`, Muon itself", "muon", 0, None, "muon0", "GWTMuon level 0"),
    Choice(
        *("the same loss, a quarter of the state", "`GWTMuon(level=0, state_dtype=torch.int8)`"),
        *("muon", 0, torch.int8, "muon0-int8", "GWTMuon level 0, int8 moments"),
    ),
    Choice(
        *("nearly that loss, the least state", "`GWTMuon(level=2, state_dtype=torch.int8)`"),
        *("muon", 2, torch.int8, "muon2-int8", "GWTMuon level 2, int8 moments"),
    ),
    Choice(
        *("AdamW's loss or less, without products of matrices", "`GWTAdafactor(level=2)`"),
        *("adafactor", 2, None, "adafactor2", "GWTAdafactor level 2"),
    ),
    Choice(
        *("AdamW's loss, and a faster step", '`GWTAdamW(level=2, rule="foam")`, without a limiter'),
        *("foam", 2, None, "foam2", "GWTAdamW level 2, foam"),
    ),
    Choice(
        *("the same, half the state", '`GWTAdamW(level=2, rule="foam", state_dtype=torch.bfloat16)`'),
        *("foam", 2, torch.bfloat16, "foam2-bf16", "GWTAdamW level 2, foam, bfloat16 moments"),
    ),
    Choice(
        *("the published algorithm", "`GWTAdamW(level=2)`"),
        *("gwt", 2, None, "gwt2", "GWTAdamW level 2, limiter"),
    ),
    Choice("AdamW", "`GWTAdamW(level=0)`", "gwt", 0, None, "adamw", "GWTAdamW level 0"),
)


def block(runs: Sequence[Run], comparison: Comparison | None) -> str:
    """Return the table, and a line for each of its three columns of numbers.

    Args:
        runs: All results.
        comparison: The comparison of the preset with most optimizers, if there is one.
    """
    losses = {} if comparison is None else {point["optimizer"]: point for point in points(comparison)}
    timed = _Timed(runs)
    rows = [
        [
            choice.wanted,
            choice.taken,
            f"{_state(choice.rule, choice.level, choice.moments):.2g}",
            losses[choice.compared]["spread"] if choice.compared in losses else "-",
            timed.over_fused(choice.timed),
        ]
        for choice in CHOICES
    ]
    headings = ["you want", "take", "state, bytes a parameter¹", "held-out loss²", "step over fused AdamW's³"]
    return f"{table(headings, rows, left=2)}\n\n{STATE} {_about_losses(comparison, losses)}\n{timed.about()}"


STATE = (
    "¹ Of a transformed matrix, in float32 unless said; embeddings, output head, norms and biases keep AdamW's 8."
)


def _about_losses(comparison: Comparison | None, losses: dict[str, dict[str, Any]]) -> str:
    if comparison is None:
        return "² Not compared yet."
    shown = [losses[choice.compared] for choice in CHOICES if choice.compared in losses]
    seeds = " or ".join(map(str, sorted({point["seeds"] for point in shown})))
    size = f"a LLaMA of {comparison.parameters / 1e6:.2f}M parameters, " if comparison.parameters else ""
    return (
        f"² Nats a byte, {size}{comparison.steps} steps (preset `{PRESET}`), each at its best swept setting, "
        f"mean ± standard deviation over {seeds} seeds."
    )


@functools.cache
def _state(rule: str, level: int, moments: torch.dtype | None) -> float:
    """Return the bytes of state per element of one matrix, as the optimizer itself makes them."""
    matrix = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH, bias=False, device="meta")})
    planned = plan(
        nn.ModuleDict({"self_attn": matrix}),
        level=level,
        rule=rule,  # type: ignore[arg-type]
        state_dtype=moments,
        dtype=torch.float32,
    )
    return planned.state_bytes / WIDTH**2


class _Timed:
    """Step times over the fused AdamW's with the same device, model, weights, threads and layers."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._main, self._model, _ = next(optimizers.timed(runs), (None, "", []))
        main = self._main
        self._weights = "bfloat16" if main is not None and main.cuda else "float32"
        found = of(runs, "optimizers")
        self._runs = [run for run in found if main is not None and _setting(run) == _setting(main)]
        self._marked: set[str] = set()
        self._absent = False

    def over_fused(self, name: str) -> str:
        """Return the newest step's time over the fused AdamW's, marked if the latter is from another run."""
        for run, case in self._cases(name):
            for other, fused in sorted(self._cases(FUSED), key=lambda found: found[0] is not run):
                if _part(other) == _part(run):
                    ratio = case.metrics["step_time"]["median"] / fused.metrics["step_time"]["median"]
                    if other is not run:
                        self._marked.add(count(run.rows[-1].get("layers") or 0, "layer"))
                    return number(ratio, 2) + ("" if other is run else "⁴")
        self._absent = True
        return "-"

    def _cases(self, name: str) -> Iterator[tuple[Run, Case]]:
        """Yield each run, newest first, that timed an optimizer, with its case."""
        for run in self._runs:
            for case in optimizers.plain(optimizers.steps_by_model(run).get(self._model, [])):
                what = case.what.get("optimizer"), case.what.get("weights")
                if what == (name, self._weights) and "step_time" in case.metrics:
                    yield run, case

    def about(self) -> str:
        """Return the footnote on the times; call it after the last `over_fused`."""
        if self._main is None:
            return "³ Nothing is timed yet."
        layers = self._main.rows[-1].get("layers")
        part = f"{count(layers, 'layer')} of {model_name(self._model)}" if layers else model_name(self._model)
        words = f"³ {self._weights} weights, {self._main.device}, {part}, {setting(self._main)}"
        words += "; - where no time under equal conditions is recorded." if self._absent else "."
        if self._marked:
            words += (
                f" ⁴ {', '.join(sorted(self._marked))}; the time of fused AdamW is from another run over as many."
            )
        return words


def _setting(run: Run) -> tuple[Any, ...]:
    row = run.rows[-1]
    return run.device, row.get("own_backend"), None if run.cuda else row.get("threads")


def _part(run: Run) -> tuple[Any, ...]:
    """Return further values that must be equal before times of two runs are compared."""
    return tuple(run.rows[-1].get(key) for key in ("layers", "embeddings", "torch"))

"""The page on quality: the best optimizers at equal state and at equal loss, and results at each size."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report import sizes, tradeoff
from bench.report.comparisons import Comparison, by_text_and_size, comparisons
from bench.report.plots import Plot
from bench.report.rows import Run

INTRODUCTION = """\
Does the model come out as good? Each preset of `python -m bench.pretrain` pre-trains one LLaMA model on the same
batches with every optimizer, each at the best of its own [sweep](sweeps.md) unless the
[page of all runs](quality_runs.md) says otherwise. *scale* is the rate of attention and MLP matrices over the
learning rate; AdamW has this setting too, so that no optimizer has one more. Losses are on held-out text, in nats
per token; a token of `llama_cpu` and the like is a byte."""

NOTHING = (
    "Nothing is recorded yet: `python -m bench.pretrain --preset cpu --compare adamw gwt1 gwt2 gwt3` measures it."
)


def in_order(runs: Sequence[Run]) -> list[Comparison]:
    """Return the comparisons of the runs by text and size; those of the chart's preset come first."""
    found = by_text_and_size(comparisons(runs))
    return sorted(found, key=lambda each: each.preset.partition(",")[0] != tradeoff.PRESET)


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    plots: list[Plot] = []
    parts = ["# Quality", INTRODUCTION]
    compared = in_order(runs)
    if not compared:
        parts.append(NOTHING)
    elif (chosen := tradeoff.of_preset(compared)) is not None:
        answered, plots = tradeoff.section(chosen, runs)
        parts += answered
    parts += sizes.section(compared, runs)
    return "\n\n".join(parts) + "\n", plots

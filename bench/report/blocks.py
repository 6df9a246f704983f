"""Generated blocks of hand-written pages, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bench.memory import level_table, memory_table
from bench.report import begin, brief, choice, finetune, optimizers, quality, tradeoff
from bench.report.comparisons import comparisons, final_losses, name_of
from bench.report.markdown import origin, setting, table, with_spread
from bench.report.rows import Run, of
from bench.report.scaling import example, gpus_table, measured, meshes_table

BLOCK = re.compile(r"<!-- (?P<name>[a-z0-9]+) -->\n(?P<text>.*?)\n?<!-- /(?P=name) -->", re.DOTALL)


def fill(page: str, runs: Sequence[Run], root: str) -> str:
    """Return a page with every block regenerated.

    Args:
        page: Text of the page.
        runs: All results.
        root: Path from the page to `docs/`, such as "docs/" or "".

    Raises:
        ValueError: the page has a block of unknown name.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"there is no block {name!r} to generate: use one of {', '.join(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name](runs, root)}\n<!-- /{name} -->"

    return BLOCK.sub(made, page)


def pages(root: Path, generated: Collection[str]) -> list[Path]:
    """Return the hand-written pages, which may contain blocks: those that are not generated as a whole."""
    return [root / "README.md", *(p for p in sorted((root / "docs").glob("*.md")) if p.name not in generated)]


def _speed(runs: Sequence[Run], root: str) -> str:
    shown = next(optimizers.timed(runs), None)
    if shown is None:
        return "Nothing is timed yet: `python -m bench.optimizers` does it."
    run, model, found = shown
    made = brief.speed(run, model, optimizers.plain(found), brief.IN_README)
    shortened = f"{made}\n\n{' '.join(brief.ROUNDING.split())}"
    return shortened if run.cuda else f"No time on a GPU is known yet. {shortened}"


def _tradeoff(runs: Sequence[Run], root: str) -> str:
    shown = tradeoff.of_preset(comparisons(runs))
    return quality.NOTHING if shown is None else tradeoff.block(shown, root)


def _begin(runs: Sequence[Run], root: str) -> str:
    return begin.section(runs, comparisons(runs))


def _int8(runs: Sequence[Run], root: str) -> str:
    found = of(runs, "codes")
    if not found:
        return "Nothing is recorded yet: `python -m bench.studies.int8` measures it."
    errors = {(row["moment"], row["power"], row["quantum"]): row["median"] for row in found[0].rows}
    moments, powers, sizes = (list(dict.fromkeys(keys)) for keys in zip(*errors, strict=True))
    headings = ["power", *(f"`{moment}`, {size}" for moment in moments for size in sizes)]
    rows = [
        [str(power), *(f"{100 * errors[moment, power, size]:.1f} %" for moment in moments for size in sizes)]
        for power in powers
    ]
    return f"{table(headings, rows)}\n\n{origin(found[0])}"


def _precision(runs: Sequence[Run], root: str) -> str:
    """Return a table of the `cpu` preset in float32 and in bfloat16, for optimizers that differ in storage."""
    shown = [c for c in comparisons(runs) if c.preset.partition(",")[0] == "cpu"]
    rows = []
    for comparison in sorted(shown, key=lambda c: c.preset):
        weights = comparison.preset.partition(", ")[2] or "float32"
        for chosen, losses in final_losses(comparison).items():
            if losses and re.match(r"adamw|gwt2|foam2|muon2", chosen.optimizer):
                state = comparison.others.get((chosen, "state_bytes"))
                size = "-" if state is None else f"{state['median']:,.0f}"
                name = name_of(chosen, comparison.runs)
                rows.append([weights, name, with_spread(losses), str(len(losses)), size])
    if not rows:
        return quality.NOTHING
    return table(["weights", "optimizer", "held-out loss", "seeds", "state bytes"], rows, left=2)


def _roundings(runs: Sequence[Run], root: str) -> str:
    """Return step times on a CPU over the float32 step of the same rule and backend, and times of the latter."""
    found = of(runs, "roundings")
    if not found:
        return "Nothing is recorded yet: `python -m bench.studies.roundings` measures it."
    columns = [(rule, backend) for rule in ("gwt", "foam") for backend in ("torch", "compiled")]
    ratios: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    times = {}
    for row in found[0].rows:
        kept, column = tuple(row[key] for key in ("weights", "rounding", "moments")), (row["rule"], row["backend"])
        shown = row["note"] if row["median"] is None else f"{row['median']:.2f}"
        if row["metric"] == "step_ratio":
            ratios.setdefault(kept, {})[column] = shown
        elif kept == ("float32", "nearest", "float32"):
            times[column] = f"{1e3 * row['median']:.1f} ms"
    headings = ["weights", "`weight_rounding`", "moments", *(f"{rule}, `{backend}`" for rule, backend in columns)]
    rows = [[*kept, *(own.get(column, "") for column in columns)] for kept, own in ratios.items()]
    own = [f"{rule} {times.get((rule, backend), 'not measured')} with `{backend}`" for rule, backend in columns]
    base = f"The float32 steps: {', '.join(own)}; `torch.optim.AdamW(fused=True)` {times['gwt', 'adamw_fused']}."
    about = f"{found[0].device}, {setting(found[0])}."
    return f"{table(headings, rows, left=3)}\n\n{base} {about}"


BLOCKS: dict[str, Callable[[Sequence[Run], str], str]] = {
    "memory": lambda runs, root: memory_table(),
    "levels": lambda runs, root: level_table(),
    "gpus": lambda runs, root: gpus_table(),
    "meshes": lambda runs, root: meshes_table(),
    "measured": lambda runs, root: measured(runs),
    "manyplan": lambda runs, root: example(),
    "take": lambda runs, root: choice.block(runs, tradeoff.of_preset(comparisons(runs))),
    "speed": _speed,
    "tradeoff": _tradeoff,
    "int8": _int8,
    "precision": _precision,
    "roundings": _roundings,
    "begin": _begin,
    "finetuned": lambda runs, root: finetune.brief(runs),
}

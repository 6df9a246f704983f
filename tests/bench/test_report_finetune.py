"""The page on fine-tuning agrees with the rows: choices by validation, spreads, shares, and failures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.common import records, sources
from bench.common.models import CONFIGS
from bench.report import finetune, rows
from bench.report.sweeps import EDGE_NOTE
from tests.support.made_up_rows import CPU, Row, measured


def run_rows(optimizer: str, recipe: str, lr: float, seed: int, loss: float, **changed: Any) -> list[Row]:
    """Return rows of one run whose test loss is 0.1 above its validation loss; None for a run that diverged."""
    what: Row = {
        "preset": "reviews",
        "model": "m",
        "optimizer": optimizer,
        "recipe": recipe,
        "lr": lr,
        "scale": 0.5,
    }
    what |= {"steps": 32, "batch": 32, "seed": seed, "precision": "mixed", "examples": 1000, "validation_size": 400}
    what |= {"test_size": 1000, "max_length": 40, "text_digest": "t", "model_digest": "w", "parameters": 22_700_000}
    what |= changed
    if loss is None:
        return [what | measured("validation_loss", "nats", None, 0, "the loss is nan") | CPU]
    state = 180e6 if optimizer == "adamw" else 118e6
    values = [
        measured("validation_loss", "nats", loss),
        measured("test_loss", "nats", loss + 0.1),
        measured("test_accuracy", "share", 1.0 - loss),
        measured("state_bytes", "B", state),
        measured("peak_memory", "B", 9e8 + 1e6 * seed),
        measured("optimizer_step", "ms", 50.0, 30),
    ]
    return [what | value | CPU for value in values]


def page_of(folder: Path, made: list[Row]) -> tuple[str, list[Any]]:
    records.append(folder / "finetune_reviews.json", "finetune", made)
    return finetune.page(rows.load(folder))


def test_choices_are_made_by_validation_and_reported_by_tests(tmp_path: Path) -> None:
    made = run_rows("adamw", "full", 1e-4, 0, 0.50) + run_rows("adamw", "full", 3e-4, 0, 0.40)
    made += run_rows("adamw", "full", 3e-4, 1, 0.42) + run_rows("adamw", "full", 1e-3, 0, None)
    made += run_rows("gwt2", "full", 3e-4, 0, 0.39) + run_rows("adamw", "lora", 1e-3, 0, 0.45)
    text, plots = page_of(tmp_path, made)
    line = "| full | AdamW | 0.0003 | 0.5 | 3 | 2 | 0.510 ± 0.014 | +0.000 | 59.0 ± 1.4 | 180.0 | 100 % | 901 |"
    assert f"{line}\n" in text  # no time of a step, since runs share their cores
    assert "| full | GWT level 2 | 0.0003 | 0.5 | 1 | 1 | 0.490 | -0.020 | 61.0 | 118.0 | 66 % | 900 |\n" in text
    assert "| lora | AdamW | 0.001 | 0.5 | 1 | 1 | 0.550 | +0.040 |" in text
    assert "| full | AdamW | 0.001 | 0.5 | diverged | diverged |" in text
    assert "| full | AdamW | 0.0001 | 0.5 | 0.500 | 0.600 |" in text
    assert "1,000 examples, 32 steps of 32, 400 to choose by and 1,000 to report on" in text
    assert "Each optimizer was tried at 1 setting, but AdamW (full) at 3. Tables and plot: 22.70M param" in text
    assert ", 2 threads, runs of 2026-01-02, commit 0123456." in text
    assert text.count("## MiniLM-L6 on film reviews") == 1
    (plot,) = plots
    assert plot.name == "finetune_reviews_memory"
    assert plot.data["models"][0]["entries"] == {
        "AdamW, full": 180.0,
        "GWT level 2, full": 118.0,
        "AdamW, lora": 180.0,
    }
    assert re.search(r"`python -m bench\.made_up`.*finetune_reviews\.json", text)


def test_choices_at_the_edge_are_marked(tmp_path: Path) -> None:
    made = [
        row for i, lr in enumerate((1e-4, 2e-4, 3e-4)) for row in run_rows("adamw", "full", lr, 0, 0.5 - 0.1 * i)
    ]
    made += [
        row for lr, loss in ((1e-4, 0.5), (2e-4, 0.4), (3e-4, 0.5)) for row in run_rows("gwt2", "full", lr, 0, loss)
    ]
    made += run_rows("adamw", "lora", 1e-3, 0, 0.45)  # the only one tried
    text, _ = page_of(tmp_path, made)
    assert "| full | AdamW | 0.0003† | 0.5 | 3 |" in text
    assert "| full | GWT level 2 | 0.0002 | 0.5 | 3 |" in text
    assert "| lora | AdamW | 0.001 | 0.5 | 1 |" in text
    assert f"\n{EDGE_NOTE}\n" in text
    inside, _ = page_of(tmp_path / "inside", [row for row in made if row["optimizer"] == "gwt2"])
    assert "†" not in inside
    corner = [row for lr in (1e-4, 2e-4) for row in run_rows("gwt2", "full", lr, 0, 0.5)]
    corner += [row for lr in (2e-4, 3e-4) for row in run_rows("gwt2", "full", lr, 0, 0.3 + 500 * lr, scale=1.0)]
    text, _ = page_of(tmp_path / "corner", corner)
    assert "| full | GWT level 2 | 0.0002† | 1† |" in text  # each value beside those with the other one equal


def test_times_of_steps_are_those_measured_apart(tmp_path: Path) -> None:
    made = run_rows("adamw", "full", 3e-4, 0, 0.40) + run_rows("gwt2", "full", 3e-4, 0, 0.39)
    what = {"of": "finetune", "preset": "reviews", "model": "m", "precision": "mixed", "recipe": "full"}
    what |= CPU | {"own_backend": "compiled", "sources": sources.digest("compiled"), "parameters": 22_700_000}
    what |= {"optimizer": "adamw"} | measured("optimizer step", "ms", 30.0, 60)
    older = what | {"date": "2026-01-01T00:00:00"} | measured("optimizer step", "ms", 9.0, 60)
    kinds: list[Row] = [{"of": "pretrain"}, {"preset": "kernel_docs"}, {"device": "another"}]
    others = [older | {"date": "2026-01-03T00:00:00"} | kind for kind in [*kinds, {"precision": "bfloat16"}]]
    record = tmp_path / "step_times_reviews.json"
    records.append(record, "step_times", [what, older, *others])
    text, _ = page_of(tmp_path, made)
    assert re.search(r"^\| full \| AdamW \|.* 100 % \| 900 \| 30\.0 \(27\.0–33\.0\) \|$", text, re.MULTILINE)
    assert re.search(r"^\| full \| GWT level 2 \|.* 66 % \| 900 \| - \|$", text, re.MULTILINE)
    assert "AdamW as `fused=True`. Median, 20th and 80th percentile: 22.70M parameters, `compiled` backend" in text
    assert ", runs of 2026-01-02, commit 0123456.\n" in text
    assert "sources have changed" not in text
    records.append(record, "step_times", [what | {"sources": "older", "date": "2026-01-04T00:00:00"}])
    assert "; **the step's sources have changed since**." in finetune.page(rows.load(tmp_path))[0]


def test_commands_run_at_the_best_of_sweeps_or_it_is_said(tmp_path: Path) -> None:
    presets = {path: json.loads((CONFIGS / f"finetune_{path}.json").read_text()) for path in finetune.PRESETS}
    made = [
        row
        for preset, values in presets.items()
        for recipe in values["recipes"]
        for optimizer in values["optimizers"]
        for row in run_rows(optimizer, recipe, 3e-4, 0, 0.4, preset=preset)
    ]
    text, _ = page_of(tmp_path, made)
    assert "\nEach optimizer runs at the best of its sweep below. When" in text
    lacking = [row for row in made if (row["preset"], row["optimizer"]) != ("kernel_docs", "muon2")]
    text, _ = page_of(tmp_path / "lacking", lacking)
    assert "setting or its grid's middle: GWT-Muon level 2 (kernel_docs, matrices). When" in text


def test_all_diverged_and_nothing_recorded(tmp_path: Path) -> None:
    text, plots = page_of(tmp_path, run_rows("adamw", "full", 1e-4, 0, None))
    assert "| full | AdamW | - | - | 1 | 0 | diverged |" in text
    assert plots == []
    assert finetune.NOTHING in finetune.page([])[0]


def test_tables_are_as_wide_in_every_row(tmp_path: Path) -> None:
    text, _ = page_of(tmp_path, run_rows("adamw", "full", 1e-4, 0, 0.4) + run_rows("gwt2", "full", 1e-4, 0, None))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_another_length_is_another_pair(tmp_path: Path) -> None:
    made = run_rows("adamw", "full", 1e-4, 0, 0.5) + run_rows("adamw", "full", 1e-4, 0, 0.4, steps=64)
    text, plots = page_of(tmp_path, made)
    assert text.count("## MiniLM-L6 on film reviews") == 2
    assert [plot.name for plot in plots] == ["finetune_reviews_memory", "finetune_reviews_older_memory"]


def test_a_language_model_has_no_accuracy_and_a_loss_before(tmp_path: Path) -> None:
    made = list(run_rows("gwt2", "matrices", 3e-5, 0, 3.6, preset="kernel_docs", examples=None))
    made = [row for row in made if row["metric"] != "test_accuracy"]
    made.append(made[0] | measured("untrained_loss", "nats", 4.25))
    text, _ = page_of(tmp_path, made)
    assert "## SmolLM2-135M on the kernel's documentation" in text
    assert "accuracy, %" not in text
    assert "Windows of plain text, 32 steps" in text
    assert "Before training the test loss is 4.250." in text


def test_readme_says_what_was_reached_and_where(tmp_path: Path) -> None:
    made = run_rows("adamw", "full", 3e-4, 0, 0.40) + run_rows("adamw", "full", 3e-4, 1, 0.42)
    made += run_rows("gwt2", "full", 3e-4, 0, 0.39) + run_rows("gwt3", "full", 3e-4, 0, None)
    made += run_rows("adamw", "matrices", 3e-4, 0, 0.2) + run_rows("adamw", "lora", 1e-3, 0, 0.45)
    text = run_rows("gwt2", "matrices", 3e-5, 0, 3.6, preset="kernel_docs", examples=None)
    text += run_rows("adamw", "matrices", 3e-5, 0, 3.7, preset="kernel_docs", examples=None)
    made += [row for row in text if row["metric"] != "test_accuracy"]
    records.append(tmp_path / "finetune_reviews.json", "finetune", made)
    reviews, documents = finetune.brief(rows.load(tmp_path)).splitlines()
    assert reviews.startswith("- MiniLM-L6 on film reviews, test accuracy and state: AdamW 59.0")
    about = "32 steps of 32, 2 seeds; 22.70M parameters, backend not recorded, 2 threads, runs of 2026-01-02"
    assert f" ({about}, commit 0123456)." in reviews
    said = "AdamW 59.0 ± 1.4 % (180 MB), GWT level 2 61.0 % (118 MB, 1 seed), LoRA 55.0 % (180 MB, 1 seed) (32"
    assert f": {said}" in reviews
    assert ", test loss and state: GWT level 2 3.700 (118 MB), AdamW 3.800 (180 MB) (32 steps" in documents
    assert finetune.brief([]) == finetune.NOTHING

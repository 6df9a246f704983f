"""Parts of the report: which runs a table or a panel takes, and how it writes numbers and reasons."""

from __future__ import annotations

import pytest

from bench.report import comparisons, markdown, optimizers, quality_runs, rows, sections
from bench.report.rows import Run
from tests.support.made_up_rows import CPU, GPU, measured, optimizer_rows, quality_rows


def test_equal_columns_are_shown_once() -> None:
    """Check columns on a CPU, where the wall time and the host's are those of the step."""
    found = optimizer_rows(CPU)
    keys = ("model", "optimizer", "weights", "clipped")
    step = {tuple(map(row.get, keys)): row["median"] for row in found if row["metric"] == "step_time"}
    same = [
        row | {"median": step[tuple(map(row.get, keys))]} if row["metric"] == "wall_time" else row for row in found
    ]
    for rows_, shown in ((found, True), (same, False)):
        run = Run("f", "optimizers", "d", rows_)
        table = optimizers.steps_table(optimizers.steps_by_model(run)["llama_60m"])
        assert ("wall, ms" in table) == shown


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ("cannot run here: ModuleNotFoundError: No module named 'apollo_torch'", "apollo_torch is not installed"),
        ("cannot run here: AssertionError: Torch not compiled with CUDA enabled", "needs a GPU"),
        ("cannot run here: RuntimeError: 0 active drivers ([]). There should only be one.", "needs a GPU"),
        ("cannot run here: ValueError: odd width", "cannot run here: odd width"),
        ("does not fit: needs 20 GiB", "does not fit: needs 20 GiB"),
    ],
)
def test_reasons_are_words(note: str, reason: str) -> None:
    missing = {"model": "m", "optimizer": "Peer", "weights": "float32"} | measured("step_time", "s", None, 0, note)
    (found,) = optimizers.steps_by_model(Run("f", "optimizers", "d", [missing])).values()
    assert optimizers.steps_table(found).endswith(f"- Peer, fp32: {reason}")


def test_each_panel_shows_one_run() -> None:
    """Check that a model missing from the newest run is shown from the run before."""
    old = rows.Run("old", "optimizers", "d", optimizer_rows(GPU))
    new = rows.Run("new", "optimizers", "d", optimizer_rows(GPU, ("llama_1b",)))
    for row in new.rows:
        if row["metric"] == "step_time" and row["median"]:
            row["median"] *= 2
    panels = {panel["title"]: panel["entries"] for panel in optimizers.step_panels([new, old])}
    assert list(panels) == ["LLaMA-60M", "LLaMA-1B", "LLaMA-7B"]
    assert panels["LLaMA-60M"][0]["median"] == pytest.approx(0.018)
    assert panels["LLaMA-1B"][0]["median"] == pytest.approx(2 * 0.018)  # its rows come first in both runs
    assert not any("clipped" in entry["label"] for entries in panels.values() for entry in entries)


def test_unfinished_runs_have_no_final_loss() -> None:
    found = quality_rows(CPU)
    cut = [r for r in found if not (r["optimizer"] == "gwt2" and r["seed"] == 2 and r.get("step", 0) > 200)]
    (comparison,) = comparisons.comparisons([rows.Run("f", "quality", "d", cut)])
    losses = {setting.optimizer: values for setting, values in comparisons.final_losses(comparison).items()}
    assert losses["gwt2"] == pytest.approx([1.56, 1.57])
    assert len(losses["adamw"]) == 3
    assert "| 2, 1 not finished |" in quality_runs.final_table(comparison)
    curve = next(series for series in quality_runs.curves(comparison) if series["label"] == "GWT level 2")
    assert curve["tokens"] == [1024 * step for step in range(40, 201, 40)]  # as far as all seeds went


def test_a_repeated_run_replaces_the_older_one() -> None:
    old, new = (rows.Run(name, "quality", "d", quality_rows(CPU)) for name in ("old", "new"))
    for row in new.rows:
        if row["metric"] == "heldout_loss":
            row["median"] += 1
    (comparison,) = comparisons.comparisons([new, old])
    losses = next(iter(comparisons.final_losses(comparison).values()))
    assert losses == pytest.approx([2.6, 2.61, 2.62])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,230"), (99.96, "100"), (12.345, "12.3"), (0.012345, "0.0123"), (0, "0"), (None, "-"), (1, "1.00")],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert markdown.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (6.404e-6, "6.40 µs"),
        (9.996e-4, "1.00 ms"),
        (0.0146, "14.6 ms"),
        (50.1, "50.1 s"),
        (2e-8, "0.0200 µs"),
        (0, "0"),
    ],
)
def test_times_are_in_a_unit_without_leading_zeros(seconds: float, text: str) -> None:
    assert markdown.duration(seconds) == text


def test_sizes_likewise() -> None:
    assert [markdown.size(count) for count in (896, 2**20 * 6.6, 2**40 * 2.28)] == ["896 B", "6.60 MiB", "2.28 TiB"]


def test_ratios_are_facts_without_the_bounds_of_the_project() -> None:
    note = "8192x28672: step_muon, share of the copy bandwidth: 0.91 (target: at least 0.9, met)"
    older = "llama_1b: level 2, times as fast: 1.20 (aim: at least 1.7, NOT met)"
    found = [{"metric": "ratio", "median": 1.0, "note": each} for each in (note, older)]
    (text,) = sections.ratios(rows.Run("file.json", "kernels", "none", found))
    assert (
        "\n- 8192x28672: step_muon, share of the copy bandwidth: 0.91\n- LLaMA-1B: level 2, times as fast: 1.20\n"
        in text
    )


def test_a_new_column_keeps_cases_apart() -> None:
    what = {"optimizer": "a", "weights": "float32", "level": 2}
    found = rows.cases([what | {"graph": on} | measured("step_time", "s", 1.0 + on) for on in (False, True)])
    assert len(found) == 2
    assert rows.telling_columns(found, ["optimizer"]) == ["optimizer", "graph"]

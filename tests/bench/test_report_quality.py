"""The page on quality: sweeps with comparisons, state against loss, and the settings to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.common import records, sources
from bench.common.names import optimizer_name, order_of, variant
from bench.report import begin, plots, quality, quality_runs, rows, sizes, sweeps, tradeoff
from bench.report.captions import caption
from bench.report.comparisons import comparisons, final_losses
from tests.support.made_up_rows import CPU, ENDS, Row, measured, quality_rows

TEXT = {"text": "(standard library)"}
PARAMETERS = 860_000


def swept(optimizer: str, losses: dict[tuple[Any, ...], list[float | None]], **more: Any) -> list[Row]:
    """Return a sweep's runs; `losses`: by rate, scale and momentum, one for each seed."""
    shared = {"model": "llama_cpu", "optimizer": optimizer, "steps": 400, "batch": 8, "accumulate": 1} | TEXT | CPU
    shared |= {"context": 128, "warmup": 0.3, "grad_clip": 0.0, "precision": "float32", "parameters": PARAMETERS}
    times = {"p20": 1.0, "median": 2.0, "p80": 3.0, "samples": 9}
    shared |= {"state_bytes_measured": 860_000, "optimizer_ms": times} | more
    return [
        shared | dict(zip(("lr", "scale", "momentum"), setting, strict=True))
        | {"seed": seed, "heldout_loss": loss, "step": shared["steps"]}
        for setting, own in losses.items()
        for seed, loss in enumerate(own)
    ]  # fmt: skip


MUON: dict[tuple[Any, ...], list[float | None]] = {
    (0.03, 0.3, 0.8): [1.5],
    (0.03, 0.3, 0.95): [1.42],
    (0.03, 0.6, 0.8): [1.40, 1.44],
    (0.03, 0.6, 0.95): [1.45],
}


def load(folder: Path, **found: list[Row]) -> list[rows.Run]:
    for name, own in found.items():
        records.append(folder / f"{name}.json", name.partition("_")[0], own)
    return rows.load(folder)


def compared(ends: dict[str, float] = ENDS, **more: Any) -> list[Row]:
    return [row | TEXT | more for row in quality_rows(CPU, ends)]


def test_times_of_steps_are_those_measured_apart(tmp_path: Path) -> None:
    about = {"of": "pretrain", "preset": "cpu", "model": "llama_cpu", "precision": "mixed", "recipe": None} | CPU
    about |= {"own_backend": "compiled", "sources": sources.digest("compiled"), "parameters": PARAMETERS}
    times = [about | {"optimizer": "gwt2"} | measured("optimizer step", "ms", 7.0, 60)]
    times += [about | {"optimizer": "galore", "model": "llama_small"} | measured("optimizer step", "ms", 8.0, 60)]
    bfloat16 = [row | {"precision": "bfloat16"} for row in compared()]
    records.append(tmp_path / "step_times_cpu.json", "step_times", times)
    runs = load(tmp_path, quality_cpu=compared(), quality_cpu_bf16=bfloat16)
    page, _ = quality_runs.page(runs)
    assert page.count("| optimizer step, ms |") == 1  # not of bfloat16 weights, which were not timed
    assert "| 1,500,000 | 30 % | 7.00 (6.30–7.70) |\n" in page
    assert "| 5,000,000 | 100 % | - |\n" in page  # the run's own time, on shared cores, is not shown
    assert "| 5,000,000 | 100 % |\n" in page
    assert page.count("AdamW as `fused=True`. Median, 20th and 80th percentile: 0.86M parameters, `compiled`") == 1


def test_an_optimizer_that_was_only_swept_is_compared_too(tmp_path: Path) -> None:
    own = swept("muon2", MUON) + swept("gwt2", {(0.03, 0.1, None): [9]})
    runs = load(tmp_path, quality_cpu=compared(), sweep_cpu=own)
    page, drawn = quality_runs.page(runs)
    row = "| GWT-Muon level 2 | 0.03 | 0.6† | 0.8† | 2 | 1.420 ± 0.028 | -0.190 | 860,000 | 17 % |\n"
    assert row in page
    assert "| GWT level 2 | 0.03 | 0.1 | - | 3 | 1.570 ± 0.010 |" in page  # what was compared stays
    assert "\nThese are a sweep's own runs: GWT-Muon level 2.\n" in page
    by_name = {plot.name: plot.data for plot in [*drawn, *quality.page(runs)[1]]}
    (point,) = (point for point in by_name["loss_over_state"] if point["label"] == "GWT-Muon level 2")
    assert (point["bytes"], point["low"], point["high"]) == (1.0, 1.40, 1.44)
    assert not any("Muon" in line["label"] for line in by_name["losses_cpu"])  # it was evaluated once


def test_the_best_setting_of_a_sweep_stands_beside_an_older_one(tmp_path: Path) -> None:
    older = [row | {"scale": 0.3, "momentum": 0.8} for row in compared({"muon2": 1.5})]
    runs = load(tmp_path, quality_cpu=compared() + older, sweep_cpu=swept("muon2", MUON))
    (comparison,) = comparisons(runs)
    found = {setting[1:]: losses for setting, losses in final_losses(comparison).items() if setting[0] == "muon2"}
    assert found == {(0.03, 0.3, 0.8): pytest.approx([1.6, 1.61, 1.62]), (0.03, 0.6, 0.8): [1.40, 1.44]}
    (point,) = (point for point in tradeoff.points(comparison) if point["optimizer"] == "muon2")
    assert point["loss"] == pytest.approx(1.42)  # the chart has one point per optimizer
    said = quality_runs.page(runs)[0].split("so the comparison is not even: ")[1].partition("\n")[0]
    assert "GWT-Muon level 2, lr 0.03, scale 0.3, momentum 0.8" in said
    assert "scale 0.6" not in said


def test_other_lengths_and_texts_are_other_comparisons(tmp_path: Path) -> None:
    short, long = swept("adamw", {(0.03, 0.1, None): [1.5]}), swept("adamw", {(0.01, 0.2, None): [1.1]}, steps=1600)
    docs = compared({"adamw": 1.3}, preset="cpu_docs", text="(Linux kernel's documentation)")
    again = compared({"adamw": 1.2}, text="(another)")
    runs = load(
        tmp_path, sweep_cpu=short, sweep_cpu_long=long, quality_cpu=compared(), quality_cpu_docs=docs + again
    )
    page, drawn = quality_runs.page(runs)
    assert {plot.name for plot in drawn} == {"losses_cpu", "losses_cpu-docs", "losses_cpu_older"}
    assert sweeps.page(runs)[1] == []  # from one setting only
    assert page.index("preset `cpu`") < page.index("preset `cpu_long`")
    for title in (
        "## llama_cpu, preset `cpu`, 400 steps, standard library, on Abacus 3000",
        "## llama_cpu, preset `cpu`, 400 steps, another, on Abacus 3000",
        "## llama_cpu, preset `cpu_docs`, 400 steps, Linux kernel's documentation, on Abacus 3000",
        "## llama_cpu, preset `cpu_long`, 1600 steps, standard library, on Abacus 3000",
    ):
        assert f"\n{title}\n" in page
    assert "| AdamW | 0.01 | 0.2 | - | 1 | 1.100 | +0.000 |" in page
    head, _, row = begin.section(runs, ()).splitlines()[:3]
    assert head.startswith("| optimizer | `cpu`: 0.86M, 400 steps | `cpu_long`: 0.86M, 1,600 steps | loss at")
    assert row == "| AdamW | 0.03 / 0.1 | 0.01 / 0.2 | 1.500 | not tried |"
    assert "Nothing is recorded" in begin.section([], ())


def test_a_record_of_two_lengths_is_two_sweeps(tmp_path: Path) -> None:
    both = swept("muon2", MUON) + swept("muon2", {key: [1.1] for key in MUON}, steps=800)
    page, drawn = sweeps.page(load(tmp_path, sweep_mine=both))
    assert "\n## llama_cpu, 400 steps" in page
    assert "\n## llama_cpu, 800 steps" in page
    assert {plot.name for plot in drawn} == {"sweep-mine-momentum", "sweep-mine_other-momentum"}
    assert "| GWT-Muon level 2 | 4 | 0.03 | 0.6† | 0.8† |" in page


def test_the_best_momentum_by_length(tmp_path: Path) -> None:
    long = {key: [losses[0] / 2 if key[2] > 0.9 else losses[0]] for key, losses in MUON.items()}
    diverged: dict[tuple[Any, ...], list[float | None]] = {(0.03, 0.6, 0.8): [1.3], (0.03, 0.6, 0.95): [None]}
    runs = load(
        tmp_path,
        sweep_cpu=swept("muon2", MUON) + swept("muon4", diverged) + swept("adamw", {(0.03, 0.1, None): [1.5]}),
        sweep_cpu_long=swept("muon2", long, steps=1600),
    )
    assert sweeps.momenta_table(sweeps.swept(runs)).splitlines()[2:] == [
        "| llama_cpu, 400 steps | GWT-Muon level 2 | 1.400 (scale 0.6) | 1.420 (scale 0.3) |",
        "| llama_cpu, 400 steps | GWT-Muon level 4 | 1.300 (scale 0.6) | diverged |",
        "| llama_cpu, 1600 steps | GWT-Muon level 2 | 1.400 (scale 0.6) | 0.710 (scale 0.3) |",
    ]


def test_equal_state_and_equal_loss_worked_by_hand(tmp_path: Path) -> None:
    own = {(0.03, 0.1, None): [1.60, 1.62]}
    ends = {"adamw": 1.5, "muon0": 1.2, "gwt2": 1.46, "gwt2-int8": 1.47}
    made = compared(ends)
    for row in made:
        if row["metric"] == "state_bytes":
            name = str(row["optimizer"])
            row["median"] = PARAMETERS * {"adamw": 8, "muon0": 4, "gwt2": 2, "gwt2-int8": 0.5}[name]
    runs = load(tmp_path, quality_cpu=made, sweep_cpu=swept("foam-row", own, state_bytes_measured=PARAMETERS // 2))
    page, _ = quality.page(runs)
    budgets = page.split("### At equal state")[1].split("### At equal loss")[0]
    muon, gwt, row = (
        "Muon, 1.310 ± 0.010 (4.00)",
        "GWT level 2, 1.570 ± 0.010 (2.00)",
        "FOAM row, 1.610 ± 0.014 (0.50)",
    )
    small = "GWT level 2, int8 moments, 1.580 ± 0.010 (0.50)"
    assert f"| 8 | {muon} | {gwt} | {muon} | {gwt} |" in budgets
    assert f"| 2.5 | {gwt} | {gwt} | {gwt} | {gwt} |" in budgets
    assert f"| 0.5 | {row} | {row} | {small} | {small} |" in budgets
    equal = page.split("### At equal loss")[1].split("### What a row costs")[0]
    row, small = "0.50: FOAM row, 1.610 ± 0.014", "0.50: GWT level 2, int8 moments, 1.580 ± 0.010"
    assert f"| AdamW, 1.610 ± 0.010 | 8.00 | {row} | {row} | {small} | {small} |" in equal
    muon = "4.00: Muon, 1.310 ± 0.010"
    assert f"| Muon, 1.310 ± 0.010 | 4.00 | {muon} | - | {muon} | - |" in equal
    assert "| FOAM row | 1.610 ± 0.014 | +0.000 | - | 0.50 |" in page.split("### What a row costs")[1]


def test_the_chart_keeps_its_legend_within_the_picture(tmp_path: Path) -> None:
    names = ["adamw", "torch_adafactor", "galore", "apollo", "foam-row", "gwt-row", "adam_mini2", "lion2"]
    names += [f"{rule}{level}" for rule in ("gwt", "foam", "muon", "adafactor") for level in range(1, 5)]
    names += ["muon0", "adafactor0", "adafactor2-published"]
    ends = {name: 1.2 + 0.01 * i for i, name in enumerate(names)}
    runs = load(tmp_path, quality_cpu=compared(ends))
    (chart,) = (plot for plot in quality.page(runs)[1] if plot.name == "loss_over_state")
    series = {point["rule"] or point["label"] for point in chart.data}
    assert len(series) == 8
    assert series >= {"gwt", "foam", "muon", "adafactor", "AdamW", "GaLore", "APOLLO"}
    left = [name for name in map(optimizer_name, names) if name not in {point["label"] for point in chart.data}]
    assert left == ["torch Adafactor", "GWT-Lion level 2", "GWT-Adafactor level 2, published details"]
    said = quality.page(runs)[0].split("Left out, so that the chart can be read: ")[1].partition("; [all runs]")[0]
    assert sorted(said.replace("2, pub", "2 pub").split(", ")) == sorted(n.replace(",", "") for n in left)
    figure = plots.KINDS["tradeoff"](chart.data)
    figure.savefig(tmp_path / "chart.png")
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    lines = {tuple(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) > 2}
    assert len(lines) <= 8
    looks = {(plots.look_of(name)["color"], plots.look_of(name)["marker"]) for name in map(optimizer_name, names)}
    assert len(looks) >= len(names) - 2  # Adafactor's two kinds of details and PyTorch's look the same
    shown = legend.get_lines()
    without_colour = {(line.get_marker(), line.get_markerfacecolor() == "white") for line in shown}
    assert len(without_colour) == len(shown) == 8, "rules and other packages' points may coincide"


def test_the_area_of_a_marker_is_the_time_of_a_step(tmp_path: Path) -> None:
    of_step = {
        "of": "pretrain",
        "preset": "cpu",
        "recipe": None,
        "p20": 0.9,
        "p80": 9.0,
        "samples": 50,
        "own_backend": "compiled",
    }
    times = [CPU | of_step | {"optimizer": name, "median": ms} for name, ms in (("adamw", 2.0), ("gwt2", 8.0))]
    times.append(times[0] | {"preset": "cpu_medium", "median": 99.0})
    plain = quality.page(load(tmp_path, quality_cpu=compared()))
    records.append(tmp_path / "step_times_cpu.json", "step_times", times)
    page, (chart,) = quality.page(rows.load(tmp_path))
    assert "The area of a marker is the median time of one step of the optimizer" in page
    assert "Abacus 3000, `compiled` backend, 2 threads, runs of 2026-01-02, commit 0123456" in page
    assert "The area of a marker" not in plain[0]
    assert {point["label"]: point["ms"] for point in chart.data if point["ms"]} == {
        "AdamW": 2.0,
        "GWT level 2": 8.0,
    }
    figure = plots.KINDS["tradeoff"](chart.data)
    areas = sorted(dots.get_sizes()[0] for dots in figure.axes[0].collections)
    assert areas[-1] == pytest.approx(4 * min(area for area in areas if area != 36.0))  # 36: those not timed
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in texts if text.endswith("ms a step") or text == "not timed"] == [
        "2 ms a step", "4 ms a step", "8 ms a step", "not timed",
    ]  # fmt: skip
    same = plots.KINDS["tradeoff"](plain[1][0].data)
    assert len({dots.get_sizes()[0] for dots in same.axes[0].collections}) == 1


LONG = [f"GWT-Muon level {level}, lr 0.03, scale 1.5, momentum 0.8, row {level}" for level in range(8)]
DRAWN: dict[str, Any] = {
    "losses": [{"label": name, "tokens": [1, 2], "mean": [2, 1], "low": [2, 1], "high": [2, 1]} for name in LONG],
    "states": {
        "what": "bytes of optimizer state per parameter, measured",
        "models": [{"title": name, "entries": dict.fromkeys(LONG, 1.0)} for name in LONG[:5]],
    },
    "sweeps": {
        "x": "momentum",
        "per": "scale",
        "panels": [
            {"title": "Muon", "lines": [{"value": 1 / (7 + i), "x": [1, 2], "loss": [2, 1]} for i in range(8)]}
        ],
    },
}


@pytest.mark.parametrize("kind", DRAWN)
def test_legends_and_labels_are_within_the_picture(kind: str, tmp_path: Path) -> None:
    figure = plots.KINDS[kind](DRAWN[kind])
    figure.savefig(tmp_path / "drawn.png")
    (legend,) = figure.legends
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
    for shown in (legend, *labels):
        box = shown.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, shown
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, shown
    assert len(legend.get_texts()) == (5 if kind == "states" else 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gwt2", "GWT level 2"), ("gwt0", "AdamW"), ("foam0-int8", "AdamW, int8 moments"),
        ("foam-row", "FOAM row"), ("lion-row", "GWT-Lion row"),
        ("foam-row-bf16", "FOAM row, bf16 moments"), ("torch_adafactor", "torch Adafactor"), ("sgd", "sgd"),
        ("muon0", "Muon"), ("muon2", "GWT-Muon level 2"), ("adafactor0", "Adafactor"),
        ("adafactor2", "GWT-Adafactor level 2"),
        ("adafactor2-published", "GWT-Adafactor level 2, published details"),
        ("adam_mini2-int8-split", "GWT-Adam-mini level 2, int8 moments, split weights"),
        ("apollo_mini", "APOLLO-Mini"),
    ],
)  # fmt: skip
def test_names_for_readers(name: str, said: str) -> None:
    assert optimizer_name(name) == said
    if own := variant(name):
        assert name.startswith(own.swept_name)


def test_order_of_the_pages() -> None:
    wanted = ["adamw", "galore", "gwt1", "gwt2", "gwt2-split", "gwt2-int8", "gwt-row", "foam1", "muon0"]
    assert sorted(set(wanted), key=order_of) == wanted


def test_what_holds_at_each_size(tmp_path: Path) -> None:
    one_seed = [row for row in compared({"adamw": 2.0, "muon2": 1.6}) if row.get("seed") == 0]
    about_medium = {"preset": "cpu_medium", "parameters": 4_900_000, "precision": "mixed"}  # as the preset has it
    medium = [row | about_medium for row in one_seed]
    medium += [row | about_medium | {"precision": "float32", "median": 9.0} for row in one_seed]  # another setting
    other = compared({"adamw": 1.2, "muon2": 1.3}, preset="cpu_docs", text="(Linux kernel's documentation)")
    runs = load(
        tmp_path,
        quality_cpu=compared({"adamw": 1.5, "muon2": 1.4, "gwt2": 1.45}),
        quality_medium=medium,
        quality_cpu_docs=other,
    )
    about, text, table, other_text, other_table, origins = sizes.section(comparisons(runs), runs)
    assert (text, other_text) == ("Over the standard library:", "Over the Linux kernel's documentation:")
    assert other_table.splitlines()[-1] == "| GWT-Muon level 2 | +0.100 ± 0.010 |"
    assert (
        "- `cpu`: 0.86M parameters, backend not recorded, 2 threads, runs of 2026-01-02, commit 0123456" in origins
    )
    assert about.startswith("## At each size")
    head, _, *lines = table.splitlines()
    assert head.strip("| ").split(" | ")[1:] == [
        "`cpu`: 0.86M, 400 steps",
        "`cpu_medium`: 4.90M, 400 steps, bfloat16 activations",
    ]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [line[0] for line in cells] == ["AdamW's loss", "GWT-Muon level 2"]  # rows of two presets
    assert cells[1][1:] == ["-0.100 ± 0.010", "-0.400 (1 seed)"]
    one = load(tmp_path / "one", quality=compared())
    assert sizes.section(comparisons(one), one) == []


GRID: dict[tuple[Any, ...], list[float | None]] = {
    (0.01, 0.1, None): [1.8],
    (0.03, 0.1, None): [1.5],
    (0.1, 0.1, None): [1.6],
    (0.03, 0.2, None): [None],
}


def test_the_best_at_the_edge_of_its_grid_is_marked_in_every_table(tmp_path: Path) -> None:
    inner = GRID | {(0.03, 0.05, None): [1.55]}
    one_value: dict[tuple[Any, ...], list[float | None]] = {(0.03, 0.1, None): [1.4], (0.1, 0.1, None): [1.5]}
    assert sweeps.edges(swept("gwt2", GRID)) == {"scale"}  # a run that diverged was tried
    assert sweeps.edges(swept("gwt2", inner)) == set()
    assert sweeps.edges(swept("gwt2", one_value)) == {"lr"}  # one scale is no grid
    assert sweeps.edges(swept("muon2", MUON)) == {"scale", "momentum"}  # of 0.6 twice, of 0.8 at the same scale
    assert sweeps.edges(swept("gwt2", {(0.03, 0.1, None): [None]})) == set()
    own = [*swept("gwt2", GRID), *swept("adamw", inner)]
    runs = load(tmp_path, sweep_cpu=own, sweep_cpu_long=[row | {"steps": 1600} for row in own], sweep_mine=own)
    note = "† At the edge of the settings tried: a value beyond may be better."
    made = begin.section(runs, ())
    assert "| GWT level 2 | 0.03 / 0.1† | 0.03 / 0.1† |" in made
    assert "| AdamW | 0.03 / 0.1 | 0.03 / 0.1 |" in made
    page = sweeps.page(runs)[0]
    assert "| GWT level 2 | 4 | - | **1.500**† (lr 0.03) | diverged |" in page
    assert "| AdamW | 5 | 1.550 (lr 0.03) | **1.500** (lr 0.03) | diverged |" in page
    assert page.count("| GWT level 2 | 4 | 0.03 | 0.1† | - |") == 1  # the presets' are on the page of all runs
    of_runs, of_sizes = quality_runs.page(runs)[0], quality.page(runs)[0]
    assert of_runs.count("| GWT level 2 | 0.03 | 0.1† | - | 1 |") == 2
    assert "| GWT level 2 | +0.000 (1 seed)† | +0.000 (1 seed)† |" in of_sizes
    assert all(text.count(note) >= 1 for text in (made, page, of_runs, of_sizes))


def test_what_changes_between_sizes(tmp_path: Path) -> None:
    better = {key: [loss and loss - 0.3 for loss in losses] for key, losses in GRID.items()}
    longer: dict[tuple[Any, ...], list[float | None]] = {(0.03, 0.05, None): [1.4], (0.03, 0.1, None): [1.5]}
    runs = load(
        tmp_path,
        sweep_cpu=swept("adamw", GRID) + swept("gwt2", better) + swept("foam2", longer),
        sweep_cpu_long=swept("adamw", longer, steps=1600)
        + swept("gwt2", GRID, steps=1600)
        + swept("foam2", {(0.03, 0.025, None): [1.45], (0.01, 0.025, None): [1.6]}, steps=1600),
    )
    assert begin.rates_table(begin.presets(runs)).splitlines() == [
        "| optimizer | `cpu` | `cpu_long` |",
        "| --- | --: | --: |",
        "| AdamW | 0.003 | 0.0015† |",
        "| GWT level 2 | 0.003 | 0.003 |",
        "| FOAM level 2 | 0.0015† | 0.00075† |",
    ]
    assert begin.differences_table(comparisons(runs)).splitlines() == [
        "| optimizer | against | `cpu` | `cpu_long` |",
        "| --- | --- | --: | --: |",
        "| GWT level 2 | AdamW | below | above |",
        "| FOAM level 2 | AdamW | below | above |",
        "| GWT level 2 | FOAM level 2 | below | above |",
    ]
    assert begin.rates_table(begin.presets(runs)[:1]) == begin.differences_table(()) == ""


def test_a_sweep_of_one_rate_is_drawn_over_the_scale(tmp_path: Path) -> None:
    scales = {(0.03, scale, None): [1.5 + scale] for scale in (0.1, 0.05, 0.2)}
    first, second = load(tmp_path, sweep_mine=swept("gwt2", scales), sweep_other=swept("gwt2", GRID))
    by_file = {run.file: sweeps.sweep_data(run, "lr") for run in (first, second)}
    (panel,) = by_file["sweep_mine.json"]["panels"]
    assert (by_file["sweep_mine.json"]["x"], by_file["sweep_mine.json"]["per"]) == ("scale", "learning rate")
    assert panel["lines"] == [{"value": 0.03, "x": [0.05, 0.1, 0.2], "loss": [1.55, 1.6, 1.7]}]
    assert (by_file["sweep_other.json"]["x"], by_file["sweep_other.json"]["per"]) == ("learning rate", "scale")
    for data in by_file.values():
        plots.KINDS["sweeps"](data).savefig(tmp_path / "drawn.png")


def test_a_scale_has_the_same_colour_in_every_sweep() -> None:
    def drawn(*scales: float) -> dict[str, Any]:
        lines = [{"value": scale, "x": [0.01, 0.1], "loss": [2.0, 1.0]} for scale in scales]
        figure = plots.KINDS["sweeps"](
            {"x": "learning rate", "per": "scale", "panels": [{"title": "A", "lines": lines}]}
        )
        (legend,) = figure.legends
        texts = [text.get_text() for text in legend.get_texts()]
        return dict(zip(texts, (line.get_color() for line in legend.get_lines()), strict=True))

    one, other = drawn(0.025, 0.1, 0.25), drawn(0.1, 0.2, 0.25, 2.4)
    assert {text: one[text] for text in one.keys() & other.keys()} == {
        text: other[text] for text in ("scale 0.1", "scale 0.25")
    }
    assert len({*one.values(), *other.values()}) == 5


def test_levels_are_told_apart_without_colour() -> None:
    series = [{"level": level, "path": "flat path", "points": [(2**16, 0.5), (2**20, 0.9)]} for level in range(4)]
    figure = plots.KINDS["roofline"]([{"title": "step", "series": series}])
    assert len({line.get_marker() for line in figure.axes[0].lines if len(line.get_xdata()) == 2} - {"None"}) == 4
    assert len({line.get_marker() for line in figure.legends[0].get_lines()}) == 4


def test_curves_are_of_the_best_settings(tmp_path: Path) -> None:
    ended_once = swept("gwt2", {(0.1, 0.05, None): [1.2]})
    worse = [row | {"lr": 0.1} for row in compared({"gwt1": 1.9})]
    (comparison,) = comparisons(load(tmp_path, quality_cpu=compared() + worse, sweep_cpu=ended_once))
    found = {line["label"]: line["mean"][-1] for line in quality_runs.curves(comparison)}
    assert found["GWT level 1"] == pytest.approx(1.59)  # not 2.01
    assert "GWT level 2" not in found  # the best was evaluated at its end only


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([CPU], "backend not recorded, 2 threads, runs of 2026-01-02, commit 0123456"),
        (
            [
                {"parameters": 860_000, "own_backend": "torch", "date": "2026-01-0" + day, "commit": day * 40}
                for day in "1324"
            ],
            "0.86M parameters, `torch` backend, runs of 2026-01-01 to 2026-01-04, commits 4444444 and 3 more",
        ),
        (
            [
                {"own_backend": "torch", "commit": "aaaaaaaaaa-dirty"},
                {"date": "2026-01-02", "commit": "bbbbbbbbbb"},
            ],
            "`torch` backend (of some runs not recorded), runs of 2026-01-02 (some undated), "
            "commits bbbbbbb, aaaaaaa with uncommitted changes",
        ),
        ([{"threads": 1}, {"threads": 2}], "backend not recorded, 1 thread or 2 threads, date not recorded"),
    ],
)
def test_captions_say_where_numbers_are_from(rows: list[Row], said: str) -> None:
    assert caption(rows) == said

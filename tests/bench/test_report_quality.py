"""The page on quality: sweeps beside comparisons, state against loss, and the settings to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.common import records
from bench.common.names import optimizer_name, order_of, variant
from bench.report import plots, quality, quality_runs, rows, sizes, sweeps, tradeoff
from bench.report.comparisons import comparisons, final_losses
from tests.support.made_up_rows import CPU, ENDS, Row, quality_rows

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


def test_an_optimizer_that_was_only_swept_is_compared_too(tmp_path: Path) -> None:
    own = swept("muon2", MUON) + swept("gwt2", {(0.03, 0.1, None): [9]})
    runs = load(tmp_path, quality_cpu=compared(), sweep_cpu=own)
    page, drawn = quality_runs.page(runs)
    row = "| GWT-Muon level 2 | 0.03 | 0.6 | 0.8 | 2 | 1.420 ± 0.028 | -0.190 | 860,000 | 17 % | 2.00 (1.00–3.00) |"
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
    assert point["loss"] == pytest.approx(1.42)  # the chart has one point an optimizer
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
    assert sweeps.page(runs)[1] == []  # of one setting
    assert page.index("preset `cpu`") < page.index("preset `cpu_long`")
    for title in (
        "## llama_cpu, preset `cpu`, 400 steps, standard library, on Abacus 3000",
        "## llama_cpu, preset `cpu`, 400 steps, another, on Abacus 3000",
        "## llama_cpu, preset `cpu_docs`, 400 steps, Linux kernel's documentation, on Abacus 3000",
        "## llama_cpu, preset `cpu_long`, 1600 steps, standard library, on Abacus 3000",
    ):
        assert f"\n{title}\n" in page
    assert "| AdamW | 0.01 | 0.2 | - | 1 | 1.100 | +0.000 |" in page
    assert "| AdamW | 0.03 | 0.1 | - | 1 | 1.500 |" in sweeps.begin(runs, "llama_cpu", 400)
    assert "| AdamW | 0.01 | 0.2 | - | 1 | 1.100 |" in sweeps.begin(runs, "llama_cpu", 1600)
    assert "Nothing is recorded" in sweeps.begin(runs, "llama_cpu", 7)


def test_a_record_of_two_lengths_is_two_sweeps(tmp_path: Path) -> None:
    both = swept("muon2", MUON) + swept("muon2", {key: [1.1] for key in MUON}, steps=800)
    page, drawn = sweeps.page(load(tmp_path, sweep_mine=both))
    assert "\n## llama_cpu, 400 steps" in page
    assert "\n## llama_cpu, 800 steps" in page
    assert {plot.name for plot in drawn} == {"sweep-mine-momentum", "sweep-mine_other-momentum"}
    assert "| GWT-Muon level 2 | 4 | 0.03 | 0.6 | 0.8 |" in page


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
    assert len(chart.data) == len(names)
    figure = plots.KINDS["tradeoff"](chart.data)
    figure.savefig(tmp_path / "chart.png")
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    lines = {tuple(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) > 2}
    assert len(lines) <= 8
    looks = {(plots.look_of(name)["color"], plots.look_of(name)["marker"]) for name in map(optimizer_name, names)}
    assert len(looks) >= len(names) - 2  # Adafactor's two kinds of details and PyTorch's share a look
    hollow = [line.get_marker() for line in legend.get_lines() if line.get_markerfacecolor() == "white"]
    assert len(set(hollow)) == len(hollow) == 4, "other packages' points may coincide"


LONG = [f"GWT-Muon level {level}, lr 0.03, scale 1.5, momentum 0.8, row {level}" for level in range(8)]
DRAWN: dict[str, Any] = {
    "losses": [{"label": name, "tokens": [1, 2], "mean": [2, 1], "low": [2, 1], "high": [2, 1]} for name in LONG],
    "states": {
        "what": "bytes of optimizer state per parameter, measured",
        "models": [{"title": name, "entries": dict.fromkeys(LONG, 1.0)} for name in LONG[:5]],
    },
    "sweeps": {
        "x": "momentum",
        "panels": [
            {"title": "Muon", "lines": [{"scale": 1 / (7 + i), "x": [1, 2], "loss": [2, 1]} for i in range(8)]}
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
    medium += [row | about_medium | {"precision": "float32", "median": 9.0} for row in one_seed]  # which is another
    runs = load(tmp_path, quality_cpu=compared({"adamw": 1.5, "muon2": 1.4, "gwt2": 1.45}), quality_medium=medium)
    about, table = sizes.section(comparisons(runs))
    assert about.startswith("## At each size")
    head, _, *lines = table.splitlines()
    assert sorted(head.strip("| ").split(" | ")[1:]) == [
        "`cpu_medium`: 4.90M, 400 steps, standard library, bfloat16 activations",
        "`cpu`: 0.86M, 400 steps, standard library",
    ]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [line[0] for line in cells] == ["AdamW's loss", "GWT-Muon level 2"]  # what two presets hold
    assert sorted(cells[1][1:]) == ["-0.100 ± 0.010", "-0.400 (1 seed)"]
    assert sizes.section(comparisons(load(tmp_path / "one", quality=compared()))) == []

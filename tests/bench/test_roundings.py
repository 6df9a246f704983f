"""The benchmark of roundings on a CPU: a row for every storage, and no times if the results differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.common import records
from bench.report.blocks import BLOCKS
from bench.report.rows import load
from bench.studies import roundings
from gwt_kernels.backends.cpu import step as compiled_step
from tests.support.native import needs_step_in_c

SMALL = ["--shape", "64", "256", "--repetitions", "2", "--level", "1"]

pytestmark = needs_step_in_c


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_storage_is_measured_and_shown(tmp_path: Path) -> None:
    assert roundings.main([*SMALL, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("roundings_*.json")
    rows = records.rows_of(path, "roundings")
    ratios = {tuple(row[k] for k in ("rule", "weights", "rounding", "moments", "backend")): row for row in rows}
    assert len(ratios) == 2 * (3 + 2 * len(roundings.STORAGES))
    assert all(row["median"] > 0 and row["samples"] == 2 and not row["note"] for row in rows)
    lines = BLOCKS["roundings"](load(tmp_path), "").splitlines()
    assert len(lines) == 2 + 1 + len(roundings.STORAGES) + 2
    assert lines[-3].startswith("| float16 | stochastic | float32 |")
    assert lines[-1].startswith("The float32 steps: gwt ")


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_step, "ROUNDINGS", SimpleNamespace(index=lambda rounding: 0))  # rounds to nearest
    monkeypatch.setattr(roundings, "RULES", ("gwt",))
    monkeypatch.setattr(roundings, "STORAGES", (roundings.Storage("bfloat16", "stochastic"),))
    assert roundings.main([*SMALL, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("roundings_*.json")
    (row,) = [row for row in records.rows_of(path, "roundings") if row["rounding"] == "stochastic"]
    assert (row["median"], row["samples"]) == (None, 0)
    assert "not those of the torch backend" in BLOCKS["roundings"](load(tmp_path), "")

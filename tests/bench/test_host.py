"""The host-time benchmark: launches through Triton without a device, and its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import host
from bench.common import records

ROOT = Path(__file__).parents[2]


def test_every_scenario_is_a_row(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--tensors", "20", "--repetitions", "3", "--profile", "40"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path), "--commit", "abc"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "fingerprint.py: holds" in result.stdout
    (path,) = tmp_path.glob("*.json")
    every = records.rows_of(path, "host")
    rows = [row for row in every if row["metric"] == "host_time"]
    assert [row["scenario"] for row in rows] == [f"GWTAdamW, {scenario.name}" for scenario in host.SCENARIOS]
    assert {row["commit"] for row in every} == {"abc"}
    assert all(row["samples"] == 3 and row["median"] > 0 and row["tensors"] == 20 for row in rows)
    least = [row for row in every if row["metric"] == "host_time_least"]
    assert all(0 < a["median"] <= b["p20"] for a, b in zip(least, rows, strict=True))
    shares = [row for row in every if row["metric"] == "own_time_share"]
    assert len(shares) == 40 * len(rows) == len(every) - 2 * len(rows)
    for i in range(0, len(shares), 40):
        own = [row["median"] for row in shares[i : i + 40]]
        assert own == sorted(own, reverse=True)
        assert 0 < sum(own) < 1


@pytest.mark.parametrize("reallocated", [False, True])
def test_gradients_are_reallocated_only_in_that_scenario(reallocated):
    params = [torch.nn.Parameter(torch.zeros(2, 4)) for _ in range(2)]
    seen: list[tuple[torch.Tensor | None, ...]] = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[override]
            seen.append(tuple(p.grad for p in params))

    host.take_turns([host.time_steps(Watching(params), params, reallocated=reallocated)], 4)
    pairs = list(pairwise(seen))
    assert len(pairs) == 4 + host.WARM_UP - 1
    for before, after in pairs:
        for one, other in zip(before, after, strict=True):
            assert one is not None
            assert other is not None
            assert (one is other) == (not reallocated)
            assert (one.data_ptr() == other.data_ptr()) == (not reallocated)


def test_sharded_parameters_add_no_calls_per_tensor():
    """Check calls, which unlike time do not depend on the machine's load: DTensor dispatches nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.host_calls"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found, matrices = json.loads(result.stdout)
    for limiter, _, plain, sharded, collectives in found:
        assert 0 < sharded < plain + 300  # one call per tensor
        assert collectives == (1 if limiter else 0)
    for few, many in matrices:  # GWTMuon, whole and sharded: equal for 100 and for 300 matrices
        assert many <= few + 20

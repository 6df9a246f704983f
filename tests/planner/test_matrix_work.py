"""Work and traffic of matrices as planned, against what processes over gloo compute and send."""

from __future__ import annotations

import pytest
import torch

from gwt_kernels.cli import main
from gwt_kernels.mesh import Mesh
from gwt_kernels.plan import plan
from gwt_kernels.plan_sharded import plan_sharded
from gwt_kernels.rules.newton_schulz import NewtonSchulz
from tests.support import forked, meshes, planned_matrices


def test_processes_send_and_compute_what_was_planned() -> None:
    forked.run(4, planned_matrices.main)


def test_work_is_shared_out_and_alike_for_replicas() -> None:
    planned = plan("llama_130m", rule="muon")
    alone = plan_sharded(planned, Mesh()).matrices
    assert alone is not None
    assert alone.sent_bytes == alone.reduced_bytes == (0,)
    assert alone.exchanges == alone.reductions == {}
    shapes = [entry.shape for entry in planned.entries if entry.level]
    assert alone.flops == (sum(NewtonSchulz().flops(*shape) for shape in shapes),)
    # By hand: five steps, of 2*n*n*m twice and 2*n*n*n once.
    assert NewtonSchulz().flops(3, 7) == NewtonSchulz().flops(7, 3) == 5 * (2 * 2 * 9 * 7 + 2 * 27)
    eight = plan_sharded(planned, Mesh(fsdp=8)).matrices
    assert eight is not None
    assert sum(eight.flops) == alone.flops[0]
    assert max(eight.flops) < 1.1 * sum(eight.flops) / 8
    # Each process sends its shards of the others' matrices, and seven eighths of its own matrices back.
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    assert sum(eight.sent_bytes) == pytest.approx(2 * 2 * elements * 7 / 8, rel=1e-9)
    copies = plan_sharded(planned, Mesh(dp=8)).matrices  # under DDP all processes compute all matrices
    assert copies is not None
    assert copies.flops == alone.flops * 8
    assert set(copies.sent_bytes) == set(copies.reduced_bytes) == {0}
    hybrid = plan_sharded(planned, Mesh(dp=2, fsdp=4)).matrices
    assert hybrid is not None
    assert sum(hybrid.flops) == alone.flops[0]
    assert set(hybrid.reductions) == {2}
    assert sum(hybrid.reduced_bytes) == 2 * 2 * elements  # of bfloat16, in two replicas
    assert plan_sharded(plan("llama_130m"), Mesh(fsdp=8)).matrices is None


def test_times_follow_from_the_stated_rates() -> None:
    planned = plan(meshes.Small(), rule="muon", bandwidth=1e9)
    rates = {"link_bandwidth": 1e6, "latency": 1e-3}
    sharded = plan_sharded(planned, Mesh(fsdp=4), matrix_flops=1e6, **rates)
    work = sharded.matrices
    assert work is not None
    assert sharded.matrix_seconds == max(work.flops) / 1e6
    (exchange,) = [c for c in sharded.collectives if not c.engine]
    assert (exchange.kind, exchange.processes, exchange.total_bytes) == ("all-to-all", 4, max(work.sent_bytes))
    assert exchange.seconds(1e6, 1e-3) == exchange.calls * 1e-3 + max(work.sent_bytes) / 1e6
    assert sharded.memory_seconds is not None
    assert sharded.seconds == sharded.memory_seconds + sharded.matrix_seconds + sharded.collective_seconds
    with pytest.raises(ValueError, match="matrix_flops must be a finite number of operations per second above 0"):
        plan_sharded(planned, Mesh(fsdp=4), matrix_flops=0.0)
    assert plan_sharded(planned, Mesh()).largest.moved_bytes == planned.chosen.moved_bytes


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "llama_60m", "--rule", "muon", "--world-size", "4", "--bandwidth", "1TB/s"]
    assert main([*command, "--matrix-flops", "100e12"]) == 0
    printed = capsys.readouterr().out
    assert "Newton-Schulz of the matrices (time predicted for 100.0 TFLOP/s)" in printed
    assert "matrices, ms" in printed
    assert "all-to-all" in printed
    assert main(["plan", "llama_60m", "--matrix-flops", "1e12"]) == 2
    assert "--matrix-flops needs --world-size or --mesh" in capsys.readouterr().err

"""Tests of matrices that are sent to one process: against whole ones, in processes over gloo, and of the plan."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gwt_kernels.distributed.matrices import MatrixExchange, MatrixParameter
from gwt_kernels.distributed.matrix_plan import (
    FEWEST_BATCHES,
    OVERLAPPED,
    Layout,
    Unit,
    assign,
    batches_of,
    in_order,
    schedule,
    units_of,
)
from gwt_kernels.mesh import Mesh
from gwt_kernels.rules.newton_schulz import WORKSPACE_BYTES, NewtonSchulz, check_workspace
from tests.support import exchanged, forked, meshes, runs

BF16 = NewtonSchulz()
LLAMA = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 8


def test_shards_equal_whole_matrices() -> None:
    forked.run(4, exchanged.equals_whole)


def test_any_layouts() -> None:
    forked.run(4, exchanged.any_layouts, range(8))


def test_bits_are_those_of_whole_matrices() -> None:
    forked.run(4, exchanged.bits)


def test_meshes_of_some_processes_in_any_order() -> None:
    forked.run(5, exchanged.some_processes)


def test_models_that_engines_divide() -> None:
    forked.run(4, exchanged.engines)


def test_memory_is_what_was_said() -> None:
    forked.run(4, exchanged.memory)


def test_batches_travel_while_others_are_computed() -> None:
    forked.run(2, exchanged.overlap)


def test_what_cannot_be_gathered_is_refused_on_every_process() -> None:
    forked.run(2, exchanged.refusals)


def test_a_dead_process_ends_the_others() -> None:
    forked.run(2, exchanged.a_dead_process)


def test_plain_parameters_need_no_process_group() -> None:
    """Check that matrices of one shape are computed at once, in the memory to which the first stage writes."""
    shapes = [(8, 12), (12, 8), (8, 12), (3, 8, 12), (0, 5), (6, 2, 3)]
    params = [MatrixParameter(f"w{i}", p) for i, p in enumerate(runs.parameters(shapes))]
    params[5] = params[5]._replace(flatten=True, row_splits=(2, 4))
    exchange = MatrixExchange(params, BF16)
    expected = [exchanged.orthogonal(p, p.tensor.detach(), BF16) for p in params]
    parts = [p.tensor.detach().clone() for p in params]
    exchanged.replace_parts(exchange, parts)
    for part, exact in zip(parts, expected, strict=True):
        runs.assert_same_bits(part, exact.float())
    assert exchange.owners == [[] for _ in shapes]
    assert (exchange.loads, exchange.sent_bytes, exchange.reduced_bytes) == ({}, 0, 0)
    seen: list[Any] = []
    exchange.run(lambda pieces, values: seen.extend(values), lambda pieces, values: None)
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in seen)
    assert sum(x.numel() for x in seen) == sum(p.tensor.numel() for p in params)


def owners_on(rank: int, mesh: Mesh) -> tuple[Any, ...]:
    with meshes.process(rank, mesh) as devices:
        model = meshes.divide(meshes.Small(), mesh, devices)
        matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2 and p.requires_grad]
        exchange = MatrixExchange([MatrixParameter(*both) for both in matrices], BF16)
        return exchange.owners, exchange.loads


@pytest.mark.parametrize("mesh", [Mesh(2, 2, 2), Mesh(2, 3, 1)])
def test_every_process_finds_the_same_owners(mesh: Mesh) -> None:
    found = list(meshes.on_every_rank(owners_on, mesh, ranks=[0, 3, mesh.size - 1]).values())
    assert all(other == found[0] for other in found)
    owners, loads = found[0]
    assert all(len(own) == 1 for own in owners)
    assert len({*map(tuple, owners)}) == len(owners) == len(loads)


# The plan --------------------------------------------------------------------------------------------------


def divided(n: int, positions: int) -> list[tuple[tuple[int, int], ...]]:
    each = -(-n // positions)
    ranges = [(i * each, min(each, n - i * each)) for i in range(positions)]
    return [(run,) if run[1] > 0 else () for run in ranges]


def layout(shape: Sequence[int], positions: int, dim: int = 0, replicas: int = 1, **options: Any) -> Layout:
    """Return the layout of a parameter that is sharded along one dimension, with replicas."""
    held = [
        tuple(run if d == dim else ((0, n),) for d, n in enumerate(shape)) for run in divided(shape[dim], positions)
    ]
    ranks = tuple(tuple(range(i * positions, (i + 1) * positions)) for i in range(replicas))
    return Layout(tuple(shape), options.get("flatten", False), options.get("row_splits"), tuple(held), ranks)


def planned(
    layouts: Sequence[Layout], workspace: int = WORKSPACE_BYTES
) -> tuple[list[Unit], list[int], Counter[int]]:
    units = in_order([u for i, x in enumerate(layouts) for u in units_of(i, x, BF16, workspace)])
    loads: Counter[int] = Counter()
    return units, assign(units, layouts[0].ranks, loads), loads


@pytest.mark.parametrize(("positions", "replicas"), [(1, 1), (2, 1), (4, 2), (8, 1), (1, 8), (3, 2)])
def test_work_is_balanced(positions: int, replicas: int) -> None:
    """Check that no process has more work than the mean plus a third of the largest matrix."""
    layouts = [layout(shape, positions, replicas=replicas) for shape in LLAMA]
    units, owners, loads = planned(layouts)
    n = positions * replicas
    assert set(owners) == set(loads) == set(range(n))
    again: Counter[int] = Counter()
    for unit, owner in zip(units, owners, strict=True):
        again[owner] += unit.work
    assert again == loads
    mean, largest = sum(loads.values()) / n, max(unit.work for unit in units)
    assert sum(loads.values()) == sum(BF16.work(*shape) for shape in LLAMA)
    assert max(loads.values()) <= mean + largest / 3 * (n > 1)
    assert planned(layouts)[1] == owners
    more = Counter(loads)  # for another mesh of the same processes
    assign(units, layouts[0].ranks, more)
    assert sum(more.values()) == 2 * sum(loads.values())
    assert max(more.values()) - min(more.values()) <= max(loads.values()) - min(loads.values())
    assert planned(layouts[::-1])[2] == loads


def test_experts_stay_where_they_are_whole_unless_that_is_unfair() -> None:
    layouts = [layout((32, 64, 48), 4) for _ in range(3)]
    units, owners, _ = planned(layouts)
    assert [unit.shape[0] for unit in units] == [8] * 12
    assert owners == [unit.holder for unit in units]
    assert not any(batch.travels for batch in batches_of(units, owners, layouts[0].ranks, WORKSPACE_BYTES))
    # Replicas share the experts that both of them hold.
    layouts = [layout((32, 64, 48), 4, replicas=2)]
    units, owners, loads = planned(layouts)
    assert [unit.shape[0] for unit in units] == [4] * 8
    assert all(owner % 4 == unit.holder for unit, owner in zip(units, owners, strict=True))
    assert len(set(loads.values())) == 1
    # Two experts on eight processes would leave six of them idle: those of other layers go there.
    layouts = [layout((2, 64, 48), 8) for _ in range(8)]
    units, owners, loads = planned(layouts)
    assert set(loads.values()) == {2 * units[0].work}
    # Rows of experts lie everywhere.
    units, owners, loads = planned([layout((32, 64, 48), 4, dim=1)])
    assert [unit.shape[0] for unit in units] == [8] * 4
    assert [unit.holder for unit in units] == [None] * 4
    assert len(set(loads.values())) == 1


@pytest.mark.parametrize("seed", range(20))
def test_units_and_their_parts_are_the_parameter(seed: int) -> None:
    """Check for random layouts that every element is once in a unit, and every element of a unit once in a part."""
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 9) for _ in range(chance.randint(2, 4)))
    positions = chance.randint(1, 5)
    own = layout(shape, positions, dim=chance.randrange(len(shape)), flatten=chance.random() < 0.3)
    seen = torch.zeros(shape)
    units = units_of(0, own, BF16, chance.choice([500, 5000, WORKSPACE_BYTES]))
    first = 0
    for unit in units:
        whole = seen[first : first + unit.shape[0]]
        assert whole.shape == unit.shape
        first += unit.shape[0]
        for part, held in zip(unit.parts, own.held, strict=True):
            own_part = torch.zeros(part.shape)
            for mine, its in part.boxes:
                own_part[mine] += 1
                whole[its] += 1
                assert own_part[mine].shape == whole[its].shape
            assert bool((own_part == 1).all())
            assert part.start + part.shape[0] <= sum(n for _, n in held[0])
    assert bool((seen == 1).all())


def test_batches_fit_and_give_every_process_something_to_do() -> None:
    n = 8
    layouts = [layout(shape, n) for shape in LLAMA]
    units, owners, _ = planned(layouts)
    for workspace in (WORKSPACE_BYTES, 4 * WORKSPACE_BYTES, 64 * WORKSPACE_BYTES):
        batches = batches_of(units, owners, layouts[0].ranks, workspace)
        assert [u for batch in batches for u in batch.units] == units
        assert [o for batch in batches for o in batch.owners] == owners
        assert len(batches) >= FEWEST_BATCHES
        for batch in batches:
            assert batch.travels
            assert max(batch.needed.values()) <= workspace
            alone = len(batch.units) == len(batch.needed)
            assert (1 if alone else OVERLAPPED) * batch.travelling <= workspace
    assert len(batches) == FEWEST_BATCHES
    assert all(set(batch.owners) == set(range(n)) for batch in batches)
    for positions in (8, 64):
        layouts = [layout(shape, positions) for shape in LLAMA * 4]
        units, owners, loads = planned(layouts)
        batches = batches_of(units, owners, layouts[0].ranks, WORKSPACE_BYTES)
        busiest = 0
        for batch in batches:
            work: Counter[int] = Counter()
            for unit, owner in zip(batch.units, batch.owners, strict=True):
                work[owner] += unit.work
            busiest += max(work.values())
        assert busiest < 1.5 * max(loads.values()), "processes wait for one another"
    # A matrix that fits together with its temporaries can be sent, for any number of processes and other matrices.
    for shape in set(LLAMA):
        check_workspace("w", shape, BF16)
    for positions, replicas in ((2, 1), (2, 4), (8, 1)):
        layouts = [layout(shape, positions, replicas=replicas) for shape in LLAMA]
        units, owners, _ = planned(layouts)
        batches = batches_of(units, owners, layouts[0].ranks, WORKSPACE_BYTES)
        assert max(batch.travelling for batch in batches) <= WORKSPACE_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_batches_go_on_in_turns_within_bounds(seed: int) -> None:
    chance = random.Random(seed)
    stages = [chance.randint(1, 5) for _ in range(chance.randint(0, 12))]
    travelling = [chance.randint(0, 60) for _ in stages]
    order = schedule(stages, travelling, 100)
    assert Counter(order) == dict(enumerate(stages))
    assert [i for k, i in enumerate(order) if i not in order[:k]] == list(range(len(stages)))
    left, started = dict(enumerate(stages)), set()
    for i in order:
        started.add(i)
        assert sum(travelling[j] for j in started if left[j]) <= 100
        left[i] -= 1
    assert schedule([3] * 4, [1] * 4, 100) == [0, 1, 0, 2, 1, 0, 3, 2, 1, 3, 2, 3]
    assert schedule([3] * 2, [60] * 2, 100) == [0, 0, 0, 1, 1, 1]

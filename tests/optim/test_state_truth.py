"""Tests that a step continues from the state as the user has changed it, and writes its results there."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from gwt_kernels import GWTAdamW
from tests.support import interpreter, runs

SHAPES = ((8, 16), (8, 12), (7,))
OPTIONS = {
    "limiter": {},
    "clipping": {"max_grad_norm": 1.0},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
    "int8 moments": {"state_dtype": torch.int8, "level": 0},
    "split": {"weight_rounding": "split"},
}


def move_data(optimizer: GWTAdamW) -> None:
    """Offload the state and bring it back, as trainers of language models do between two phases."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def move_to_shared_memory(optimizer: GWTAdamW) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


def replace_tensors(optimizer: GWTAdamW) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def replace_states(optimizer: GWTAdamW) -> None:
    for p, state in list(optimizer.state.items()):
        optimizer.state[p] = {key: value.clone() for key, value in state.items()}


def set_memory(optimizer: GWTAdamW) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.set_(value.clone())


def free_and_refill(optimizer: GWTAdamW) -> None:
    """Free a tensor's memory and allocate other memory for it, as FSDP does with gathered parameters."""
    for state in optimizer.state.values():
        for value in state.values():
            kept, storage = value.clone(), torch.UntypedStorage(value.nbytes, device=value.device)
            value.set_(storage, 0, value.shape, value.stride())
            value.untyped_storage().resize_(0)
            value.untyped_storage().resize_(kept.nbytes)
            value.copy_(kept)


MOVES: dict[str, Callable[[GWTAdamW], None]] = {
    ".data": move_data,
    "shared memory": move_to_shared_memory,
    "tensors": replace_tensors,
    "states": replace_states,
    "set_": set_memory,
    "resize_": free_and_refill,
}


def build(device: torch.device, backend: str, **options) -> GWTAdamW:
    dtype = torch.bfloat16 if options.get("weight_rounding") else torch.float32
    shapes = [(64, 64), *SHAPES[1:]] if options.get("state_dtype") == torch.int8 else SHAPES  # or they stay float32
    return GWTAdamW(runs.parameters(shapes, device, dtype), lr=0.1, backend=backend, **({"level": 2} | options))


@pytest.mark.parametrize(
    ("move", "option"),  # every move with two options, every option with two moves or three
    [(move, list(OPTIONS)[(i + k) % len(OPTIONS)]) for i, move in enumerate(MOVES) for k in (0, 2)],
)
@runs.backends
def test_steps_continue_from_moved_states(backend, option, move, device):
    options, move = OPTIONS[option], MOVES[move]
    on = runs.place(backend, device)
    expected, moved = build(on, backend, **options), build(on, backend, **options)
    with interpreter.like_a_gpu():
        for optimizer in (expected, moved):
            runs.train(optimizer, range(2))
        for t in range(2, 4):
            move(moved)
            for optimizer in (expected, moved):
                runs.train(optimizer, [t])
            runs.assert_same_bits(runs.results(moved), runs.results(expected))
    counts = [float(state["step"]) for state in moved.state_dict()["state"].values()]
    assert counts == [4] * len(SHAPES)


@pytest.mark.parametrize("key", ["step", "limiter_norm", "exp_avg", "exp_avg_sq", "weight_low"])
@pytest.mark.parametrize("move", [move_data, set_memory, free_and_refill])
@runs.backends
def test_values_written_to_moved_memory_are_used(backend, move, key, device):
    """Check written values, as a control of the test above, whose moves change no number."""
    on = runs.place(backend, device)
    expected, moved = (build(on, backend, weight_rounding="split") for _ in range(2))
    with interpreter.like_a_gpu():
        for optimizer in (expected, moved):
            runs.train(optimizer, range(2))
        move(moved)
        for state in moved.state.values():
            state[key].fill_(5)
        for p, state in expected.state.items():
            expected.state[p] = {**state, key: torch.full_like(state[key], 5)}
        for optimizer in (expected, moved):
            runs.train(optimizer, [2])
    runs.assert_same_bits(runs.results(moved), runs.results(expected))


def test_tensors_of_the_state_stay_the_same_objects():
    optimizer = build(runs.CPU, "torch")
    runs.train(optimizer, range(1))
    held = [value for state in optimizer.state.values() for value in state.values()]
    runs.train(optimizer, [1])
    optimizer.zero_grad()
    runs.give_gradients(runs.parameters_of(optimizer)[:2], seed=2)  # buckets change
    optimizer.step()
    now = [value for state in optimizer.state.values() for value in state.values()]
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert [float(state["step"]) for state in optimizer.state.values()] == [3, 3, 2]


def test_a_checkpoint_after_a_move_resumes_with_the_same_update():
    optimizer = build(runs.CPU, "torch")
    runs.train(optimizer, range(1))
    move_data(optimizer)
    runs.train(optimizer, range(1, 30))
    resumed = GWTAdamW(
        [nn.Parameter(p.detach().clone()) for p in runs.parameters_of(optimizer)], lr=0.1, backend="torch"
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        runs.train(each, [30])
    runs.assert_same_bits(runs.results(resumed), runs.results(optimizer))


def _take_steps(optimizer: GWTAdamW, steps: int) -> None:
    torch.set_num_threads(1)
    runs.train(optimizer, range(1, steps + 1))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipping"])
def test_processes_share_step_counts(options):
    """Check steps as in Hogwild: weights and state are in shared memory, and every process updates them."""
    optimizer = GWTAdamW(runs.parameters([(8, 8)]), lr=0.01, backend="torch", **options)
    runs.train(optimizer, range(1))
    (p,), (state,) = runs.parameters_of(optimizer), optimizer.state.values()
    p.share_memory_()
    move_to_shared_memory(optimizer)
    p.grad = None
    process = mp.get_context("spawn").Process(target=_take_steps, args=(optimizer, 3))
    process.start()
    process.join()
    assert process.exitcode == 0
    (state,) = optimizer.state_dict()["state"].values()
    assert float(state["step"]) == 4
    runs.train(optimizer, [9])
    assert float(state["step"]) == 5


def test_freed_memory_is_refused_by_name(device):
    for backend in runs.BACKENDS:
        optimizer = build(runs.place(backend, device), backend)
        with interpreter.like_a_gpu():
            runs.train(optimizer, range(1))
            state = next(iter(optimizer.state.values()))
            state["exp_avg"].untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of group 0 .* freed"):
                runs.train(optimizer, [1])


@pytest.mark.parametrize(
    "make", [int, float, lambda n: torch.tensor(n, dtype=torch.int64), lambda n: torch.tensor([n])]
)
def test_step_counts_of_several_types_are_accepted(make: Callable[[int], float | Tensor]):
    expected, other = build(runs.CPU, "torch"), build(runs.CPU, "torch")
    for optimizer in (expected, other):
        runs.train(optimizer, range(3))
    state = copy.deepcopy(other.state_dict())
    for own in state["state"].values():
        own["step"] = make(3)
    other.load_state_dict(state)
    for own in other.state.values():
        assert own["step"].dtype == torch.float64
        own["step"] = make(3)  # set by hand
    for optimizer in (expected, other):
        runs.train(optimizer, [3])
    runs.assert_same_bits(runs.results(other), runs.results(expected))


def test_numpy_step_counts_are_accepted():
    np = pytest.importorskip("numpy")
    optimizer = build(runs.CPU, "torch")
    runs.train(optimizer, range(2))
    for value in (np.float32(2), np.int64(2), np.array(2)):
        state = copy.deepcopy(optimizer.state_dict())
        for own in state["state"].values():
            own["step"] = value
        optimizer.load_state_dict(state)
        assert all(float(own["step"]) == 2 for own in optimizer.state.values())


@pytest.mark.parametrize("bad", [-1, float("nan"), "3", None, True, torch.ones(2)])
def test_bad_step_counts_are_refused_by_name(bad):
    optimizer = build(runs.CPU, "torch")
    runs.train(optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] = bad
    with runs.refused(optimizer, ValueError, "step", "parameter 1 of group 0"):
        optimizer.load_state_dict(state)


def test_every_tensor_of_a_state_has_a_storage_of_its_own():
    """Check that freeing, filling or saving the storage of one does not affect another."""
    optimizer = build(runs.CPU, "torch")
    runs.train(optimizer, range(2))
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert len({value.untyped_storage().data_ptr() for value in values}) == len(values)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in values)
    first, second, _ = optimizer.state.values()
    first["step"].untyped_storage().fill_(0)
    assert [float(first["step"]), float(second["step"])] == [0, 2]
    with pytest.raises(RuntimeError, match="not resizable"):  # and not memory that others still use
        second["step"].untyped_storage().resize_(0)
    runs.train(optimizer, [2])
    assert [float(first["step"]), float(second["step"])] == [1, 3]


@pytest.mark.parametrize("backend", ["compiled", "triton"])  # PyTorch's operators do not check it
def test_a_gradient_with_freed_memory_is_refused(backend, device):
    optimizer = build(runs.place(backend, device), backend)
    with interpreter.like_a_gpu():
        runs.train(optimizer, range(2))
        runs.give_gradients(runs.parameters_of(optimizer), seed=2)
        runs.parameters_of(optimizer)[1].grad.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="memory"):
            optimizer.step()


def test_processes_that_clip_lose_no_steps():
    """Check steps that the device counts, in a copy of the shared counts."""
    optimizer = GWTAdamW(runs.parameters([(8, 8)]), lr=0.01, backend="torch", max_grad_norm=1.0)
    runs.train(optimizer, range(1))
    move_to_shared_memory(optimizer)
    (state,) = optimizer.state.values()
    (bucket,) = (optimizer.step(), optimizer._plan.buckets)[1]
    inputs = type(bucket).inputs

    def another_process_counts(self, grads, hypers):
        found = inputs(self, grads, hypers)
        state["step"].add_(1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bucket), "inputs", another_process_counts)
        runs.train(optimizer, [1])
    assert float(state["step"]) == 4


def test_users_entries_of_a_state_are_unchanged():
    optimizer, expected = build(runs.CPU, "torch"), build(runs.CPU, "torch")
    optimizer.state["epoch"] = 5
    for each in (optimizer, expected):
        runs.train(each, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"]["epoch"] == 5
    optimizer.load_state_dict(saved)
    assert optimizer.state.pop("epoch") == 5
    runs.assert_same_bits(runs.results(optimizer), runs.results(expected))


def test_rows_of_telemetry_follow_their_parameter():
    optimizer = GWTAdamW(runs.parameters([(8, 8)]), telemetry=True, backend="torch")
    gone = []
    for t in range(3):
        runs.train(optimizer, [t])
        gone.append(weakref.ref(optimizer.param_groups[0]["params"][0]))
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = runs.parameters([(8, 8)], seed=t)
    runs.train(optimizer, [3])
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3

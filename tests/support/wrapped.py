"""Other ways to distribute a model, and unsupported ones; test_sharding.py starts the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTMuon, gwt_param_groups, migrate, release_gradients
from tests.support import runs
from tests.support.sharded import COLUMNS, ROWS, WHOLE, mesh_of, shard


def everywhere(value: Any) -> list[Any]:
    """Gather a value from every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train with different data on every process."""
    for t in range(steps):
        generator = torch.Generator().manual_seed(100 * t + dist.get_rank())
        x = torch.randn(4, 24, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def released() -> None:
    """Check gradient release on shards, bit for bit: one matrix at a time is sent to its owner and back."""
    for kind, rule in ((GWTAdamW, "gwt"), (GWTMuon, "muon"), (GWTAdafactor, "adafactor")):
        made = []
        for is_released in (False, True):
            model = fully_shard(network(torch.float32), mesh=mesh_of(2))
            groups = gwt_param_groups(model, include=["0", "2"], rule=rule)
            optimizer = kind(groups, lr=1e-2)
            if is_released:
                release_gradients(model, optimizer)
            train(model, optimizer, 4)
            made.append([p.to_local().detach() for p in model.parameters()])
            assert [p.grad is None for p in model.parameters()] == [is_released] * len(made[0])
        runs.assert_same_bits(*made)


def replicas() -> None:
    """Check that replicas stay equal bit for bit under DDP and ZeroRedundancyOptimizer, rounding at random."""
    for options in ({"rule": "gwt"}, {"rule": "foam", "state_dtype": torch.bfloat16}):
        model = DistributedDataParallel(network())
        groups = gwt_param_groups(model, include=["0", "2"], level=2)
        optimizer = GWTAdamW(groups, lr=1e-2, weight_rounding="stochastic", **options)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 30)
        ours = runs.results(optimizer)
        runs.assert_differ([p.detach() for p in model.parameters()], before)
        for theirs in everywhere(ours):
            runs.assert_same_bits(theirs, ours)
    model = DistributedDataParallel(network())
    sharing = ZeroRedundancyOptimizer(
        [p for p in model.parameters() if p.dim() > 1],
        GWTAdamW,
        lr=1e-2,
        level=2,
        weight_rounding="stochastic",
    )
    train(model, sharing, 30)
    ours = [p.detach().clone() for p in model.parameters()]
    for theirs in everywhere(ours):
        runs.assert_same_bits(theirs, ours)
    counts = everywhere(len(sharing.optim.state))
    assert sum(counts) == 2, f"each state should be on one process, they hold {counts}"


def collectives(function: Callable[[], object]) -> list[int]:
    """Return the bytes of each all-reduce that ``function`` starts."""
    sizes = []
    own = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return own(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        function()
    return sizes


def refusals() -> None:
    """Check that unsupported uses raise a named error on every process, and change nothing."""
    _of_parameters()
    _of_gradients()
    _of_states()
    _communication()


def refused(words: str, params: list[Tensor], error: type[Exception] = ValueError, **options: Any) -> None:
    """Check that the constructor raises, with all the words, on every process."""
    try:
        GWTAdamW([("the.name", p) for p in params], **options)
    except Exception as caught:
        said = f"{type(caught).__name__}: {caught}"
    else:
        said = "nothing"
    for message in everywhere(said):
        assert message.startswith(error.__name__), f"{message}, expected {error.__name__} about {words}"
        assert all(word in message for word in ["the.name", *words.split(", ")]), f"{message}, expected {words}"


def _of_parameters() -> None:
    line = mesh_of(2)
    columns = shard(torch.zeros(4, 12), line, [COLUMNS])
    refused("level 2, use level 1", [columns], level=2)
    GWTAdamW([columns], level=1)
    GWTAdamW([shard(torch.zeros(4, 7), line, [COLUMNS])], level=0)
    refused("level 1, use level 0", [shard(torch.zeros(7), line, [ROWS])], level=1)
    refused("db2, rows", [columns], level=1, wavelet="db2")
    refused("bior2.2, rows", [columns], level=1, wavelet="bior2.2", boundary="reflect")
    refused("Partial, redistribute", [nn.Parameter(DTensor.from_local(torch.zeros(4, 8), line, [Partial()]))])
    refused("int8, bfloat16", [shard(torch.zeros(8, 4096), line, [COLUMNS])], level=2, state_dtype=torch.int8)
    refused("int8, bfloat16", [shard(torch.zeros(9, 4096), line, [ROWS])], level=2, state_dtype=torch.int8)
    GWTAdamW([shard(torch.zeros(9, 64), line, [ROWS])], level=2, state_dtype=torch.int8)  # too small for int8
    uneven = DTensor.from_local(torch.zeros(1 + 2 * dist.get_rank(), 8), line, [ROWS], shape=(4, 8), stride=(8, 1))
    refused("shard of shape, distribute_tensor", [nn.Parameter(uneven)])
    three = nn.Parameter(distribute_tensor(torch.zeros(4, 6, 8), line, [Shard(1)]))
    GWTAdamW([three], level=2, state_dtype=torch.bfloat16)
    # FSDP1 requires an accelerator, so its flat parameters are imitated here.
    refused("FSDP1, FSDP2", [FlatParameter(torch.zeros(8))], TypeError)
    refused("flat, FSDP2", [nn.Parameter(torch.zeros(64)[8:24])], TypeError, level=1)
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = network()
    with pytest.raises(TypeError, match="FSDP2"):
        gwt_param_groups(wrapper, include=["0"])
    partitioned = nn.Parameter(torch.zeros(8))
    partitioned.ds_id = 0
    refused("ZeRO, FSDP2", [partitioned], TypeError)
    # ZeRO's first stages replace the parameters by one flat buffer after the optimizer's construction.
    optimizer = GWTAdamW([nn.Parameter(torch.zeros(4, 8))], level=2)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(32))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(32)
    with runs.refused(optimizer, TypeError, "flat", "FSDP2"):
        optimizer.step()


def _of_gradients() -> None:
    line, other = mesh_of(2), mesh_of(2, 1)
    p = shard(torch.zeros(4, 8), line, [ROWS])
    optimizer = GWTAdamW([p], level=2)
    p.grad = distribute_tensor(torch.ones(4, 8), other, [ROWS, WHOLE])
    with runs.refused(optimizer, RuntimeError, "DeviceMesh", "backward"):
        optimizer.step()
    # Another placement on the same mesh is redistributed to the parameter's.
    whole = nn.Parameter(torch.zeros(4, 8))
    reference = GWTAdamW([whole], level=2)
    g = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    p.grad = DTensor.from_local(g / 2, line, [Partial()])
    whole.grad = g
    optimizer.step()
    reference.step()
    torch.testing.assert_close(p.full_tensor().detach(), whole.detach(), rtol=1e-6, atol=1e-8)


def _of_states() -> None:
    line = mesh_of(2)
    p, whole = shard(torch.zeros(4, 8), line, [ROWS]), nn.Parameter(torch.zeros(4, 8))
    sharded, plain = GWTAdamW([p], level=2), GWTAdamW([whole], level=2)
    p.grad, whole.grad = distribute_tensor(torch.ones(4, 8), line, [ROWS]), torch.ones(4, 8)
    sharded.step()
    plain.step()
    for to, state in ((sharded, plain.state_dict()), (plain, sharded.state_dict())):
        with runs.refused(to, ValueError, "DTensor", "set_optimizer_state_dict"):
            to.load_state_dict(state)
    state = sharded.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].redistribute(placements=[WHOLE])
    with runs.refused(sharded, ValueError, "exp_avg", "Replicate", "redistribute"):
        sharded.load_state_dict(state)
    for target in (GWTAdamW([p], level=1), GWTAdamMini([p], head_rows=None), GWTAdafactor([p], level=0)):
        with pytest.raises(ValueError, match=r"parameter 0 of shape .* is of shards.*one process without shards"):
            migrate(sharded.state_dict(), target)


LIMITER = 20 * 4
"""Bytes of the limiter's: a float32 number for each parameter."""
NORM = 2 * 8
"""Bytes of the gradient norm's: the sum of squares and the number of values that are not finite, in float64."""


def _communication() -> None:
    """Check the bytes of a step's all-reduces: one if the limiter acts, one before it for clipping, or none."""
    line = mesh_of(2)
    for expected, options in (
        ([LIMITER], {"level": 2}),
        ([], {"level": 2, "norm_growth_limit": None}),
        ([], {"level": 2, "rule": "foam"}),
        ([], {"level": 0}),
        ([NORM, LIMITER], {"level": 2, "max_grad_norm": 1.0}),
    ):
        params = [shard(p, line, [ROWS]) for p in runs.parameters([(4, 8)] * 20)]
        optimizer = GWTAdamW(params, **options)
        for p in params:
            p.grad = distribute_tensor(torch.ones(4, 8), line, [ROWS])
        for _ in range(2):
            assert collectives(optimizer.step) == expected, options
    # A process without gradients takes part too.
    optimizer = GWTAdamW(params, level=2, max_grad_norm=1.0)
    if dist.get_rank():
        optimizer.zero_grad()
    assert collectives(optimizer.step) == [NORM, LIMITER]
    assert float(optimizer.grad_norm) == pytest.approx((20 * 16) ** 0.5)

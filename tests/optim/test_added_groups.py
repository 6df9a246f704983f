"""Groups and parameters added or replaced by other code after construction."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gwt_kernels import GWTAdamW, GWTMuon, gwt_param_groups
from tests.support import runs


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(10, 16),
            "proj": nn.Linear(16, 16),
            "norm": nn.LayerNorm(16),
            "narrow": nn.Linear(2, 16),
            "lm_head": nn.Linear(16, 10, bias=False),
        }
    )


def shapes(optimizer: torch.optim.Optimizer) -> list[tuple[int, list[tuple[int, ...]]]]:
    return [(group["level"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]


def base(named: bool = True, **options) -> GWTAdamW:
    p = nn.Parameter(torch.ones(8, 8))
    return GWTAdamW([("first", p)] if named else [p], lr=0.1, **options)


def step(optimizer: GWTAdamW) -> None:
    runs.give_gradients(runs.parameters_of(optimizer), seed=1)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*without a level")
@pytest.mark.parametrize("named", [True, False])
def test_groups_without_names_and_level_are_accepted(named):
    optimizer = base(named)
    added = {"params": model()["proj"].parameters(), "lr": 0.5}
    optimizer.add_param_group(added)
    assert shapes(optimizer) == [(2, [(8, 8)]), (2, [(16, 16)]), (0, [(16,)])]
    assert optimizer.param_groups[1] is added
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.5]
    names = [group.get("param_names") for group in optimizer.param_groups]
    assert names == ([["first"], ["added.1.0"], ["added.1.1"]] if named else [None] * 3)
    step(optimizer)
    assert [tuple(optimizer.state[p]["exp_avg"].shape) for p in runs.parameters_of(optimizer)] == [
        (8, 2),
        (16, 4),
        (16,),
    ]
    torch.optim.AdamW([("first", nn.Parameter(torch.ones(2)))]).state_dict()


def test_names_by_place_are_given_once():
    """Check unique names, by which telemetry and random bits identify parameters."""
    optimizer = base(telemetry=True)
    for _ in range(2):
        optimizer.add_param_group({"params": two((8, 8))})
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": two((8, 8), (4, 8))})
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == ["first", "added.2.0", "added.3.0", "added.3.1"]
    step(optimizer)
    assert list(optimizer.telemetry()) == names


@pytest.mark.filterwarnings("ignore:.*without a level")
def test_named_embeddings_and_heads_stay_at_level_0():
    optimizer = base()
    optimizer.add_param_group({"params": model().named_parameters()})
    transformed, plain = optimizer.param_groups[1:]
    assert transformed["param_names"] == ["proj.weight"]
    expected = ["embed_tokens.weight", "proj.bias", "norm.weight", "norm.bias", "narrow.weight", "narrow.bias"]
    assert plain["param_names"] == [*expected, "lm_head.weight"]
    assert plain["level"] == 0
    step(optimizer)


def test_level_0_of_added_parameters_is_warned_of_once():
    optimizer = base()
    with pytest.warns(UserWarning, match=r"^level 0 \(AdamW\) for 1 of the parameters added without a level"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(8))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(8))})
        base().add_param_group({"params": nn.Parameter(torch.ones(8, 8))})
        base().add_param_group({"params": nn.Parameter(torch.ones(8)), "level": 1})
        base(level=0).add_param_group({"params": nn.Parameter(torch.ones(8))})


def test_a_warning_that_is_an_error_adds_nothing():
    optimizer = base(level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with runs.refused(optimizer, UserWarning, "without a level"):
            optimizer.add_param_group({"params": two((8, 8), (8,))})
        optimizer.add_param_group({"params": two((8, 8), (8,)), "level": 1})
    step(optimizer)


def test_an_explicit_level_is_kept_or_refused():
    optimizer = base()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8))], "level": 1})
    assert shapes(optimizer)[1] == (1, [(8,)])
    with pytest.raises(ValueError, match="too deep"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, 2))], "level": 2})
    assert len(optimizer.param_groups) == 2


def test_groups_of_the_constructor_keep_the_optimizers_level():
    assert shapes(GWTAdamW([nn.Parameter(torch.ones(8))])) == [(2, [(8,)])]
    with pytest.raises(ValueError, match="too deep"):
        GWTAdamW([nn.Parameter(torch.ones(8, 2))])


@pytest.mark.filterwarnings("ignore:.*without a level")
def test_a_bad_group_changes_nothing():
    optimizer = base()
    first = runs.parameters_of(optimizer)[0]
    for bad in ([nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8).long(), requires_grad=False)], [first]):
        group = {"params": list(bad)}
        before = dict(group)
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert all(a is b for a, b in zip(group["params"], before["params"], strict=True))
    step(optimizer)


@pytest.mark.filterwarnings("ignore:.*without a level")
def test_added_groups_are_saved_loaded_copied_and_pickled():
    first, second = base(), base()
    for optimizer in (first, second):
        optimizer.add_param_group({"params": model()["proj"].parameters()})
    step(first)
    second.load_state_dict(first.state_dict())
    runs.assert_same_bits(runs.snapshot(second)["state"], runs.snapshot(first)["state"])
    other = copy.deepcopy(first)
    other.add_param_group({"params": model()["norm"].parameters()})
    assert shapes(other)[-1] == (0, [(16,), (16,)])
    step(other)


def swap(optimizer: GWTAdamW, *params: torch.Tensor) -> None:
    optimizer.param_groups[0]["params"] = list(params)


def two(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(s)) for s in shapes]


def test_parameters_of_another_model_are_accepted():
    optimizer = GWTAdamW(two((8, 8), (8,)))
    step(optimizer)
    for new in (two((8, 8), (8,)), two((16, 16), (16,)), two((8, 8), (8,), (4, 4), (12,)), two((8, 8))):
        swap(optimizer, *new)
        step(optimizer)
        assert all(p in optimizer.state for p in new)


@pytest.mark.parametrize("flat", [[(64,)], [(72,)], [(72,), (8, 8)], [(36,), (36,)]])
def test_flat_buffers_are_refused(flat):
    optimizer = GWTAdamW(two((8, 8), (8,)))
    swap(optimizer, *two(*flat))
    runs.give_gradients(runs.parameters_of(optimizer), seed=1)
    with runs.refused(optimizer, TypeError, "flat buffers", "level 0"):
        optimizer.step()


def test_one_matrix_flattened_is_refused():
    optimizer = GWTAdamW(two((8, 8)))
    swap(optimizer, *two((64,)))
    runs.give_gradients(runs.parameters_of(optimizer), seed=1)
    with runs.refused(optimizer, TypeError, "flat buffers"):
        optimizer.step()


@pytest.mark.parametrize("level", [1, 0], ids=["one level", "two levels"])
@pytest.mark.parametrize("change", ["delete", "reverse", "insert"])
def test_groups_are_removed_and_moved_as_in_torch(level, change):
    """Check groups that are removed, like those of layers frozen again, or moved: the others continue unchanged."""
    matrices, vectors = two((8, 8), (8, 8), (4, 8)), two((8,), (12,))
    optimizer = GWTAdamW([{"params": matrices, "level": 1}, {"params": vectors, "level": level}])
    alone = copy.deepcopy(optimizer)
    runs.train(optimizer, range(2))
    runs.train(alone, range(2))
    groups = optimizer.param_groups
    if change == "delete":
        del groups[0]
    elif change == "reverse":
        groups.reverse()
    else:
        optimizer.add_param_group({"params": two((2, 8)), "level": 2})
        groups.insert(0, groups.pop())
    for p in (*matrices, *vectors):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, q in zip((*matrices, *vectors), runs.parameters_of(alone), strict=True):
        q.grad = None if change == "delete" and p.dim() > 1 else torch.ones_like(q)
    alone.step()
    runs.assert_same_bits([*matrices, *vectors], runs.parameters_of(alone))


def test_a_parameter_is_moved_to_a_group_of_its_form():
    matrices = two((8, 8), (4, 8))
    optimizer = GWTAdamW([{"params": matrices}, {"params": two((16, 8)), "rule": "foam"}])
    step(optimizer)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    runs.give_gradients(runs.parameters_of(optimizer), seed=1)
    words = "rule of group 1 was changed from 'gwt' to 'foam'", "state of parameter 1 of group 1"
    with runs.refused(optimizer, ValueError, *words):
        optimizer.step()
    optimizer.param_groups[1]["rule"] = "gwt"
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    optimizer.state.pop(optimizer.param_groups[1]["params"][0])
    step(optimizer)


def test_one_dimensional_views_are_no_flat_buffers():
    base = torch.randn(10, 2)
    GWTAdamW([nn.Parameter(base[..., 0])], level=1)
    column = nn.Parameter(torch.randn(10, 2)[..., 1])
    other = nn.Parameter(column.detach().clone())
    for p in (column, other):
        optimizer = GWTAdamW([p], level=1)
        runs.train(optimizer, range(3))
    assert torch.equal(column, other)
    with pytest.raises(TypeError, match=r"or a view: use level 0 or clone\(\)"):
        GWTAdamW([nn.Parameter(torch.randn(20)[4:14])], level=1)
    GWTAdamW([nn.Parameter(torch.randn(20)[4:14])], level=0)


def sharded_in_place_of_plain() -> None:
    """Shard parameters after construction, as Accelerate's FSDP2 does; test_sharding.py calls it in one process."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plain = copy.deepcopy(network)
    optimizer, expected = GWTAdamW(network.parameters(), lr=0.1), GWTAdamW(plain.parameters(), lr=0.1)
    old = {name: p.data_ptr() for name, p in network.named_parameters()}
    for group in optimizer.param_groups:
        placeholders = []
        for p in group["params"]:
            placeholder = torch.empty(1)
            placeholder.data_ptr = p.data_ptr()
            placeholders.append(placeholder)
        group["params"] = placeholders
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
    new = {old[name]: p for name, p in network.named_parameters()}
    fsdp2_switch_optimizer_parameters(optimizer, new)
    for _ in range(3):
        for net, each in ((network, optimizer), (plain, expected)):
            each.zero_grad()
            net(torch.linspace(-1, 1, 64).view(4, 16)).square().sum().backward()
            each.step()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert torch.equal(p.full_tensor(), q)


def test_more_parameters_than_names_are_accepted():
    optimizer = GWTAdamW([(str(i), p) for i, p in enumerate(two((8, 8), (8, 8)))])
    step(optimizer)
    swap(optimizer, *two((8, 8), (8, 8), (8, 8)))
    step(optimizer)
    optimizer.param_groups[0]["params"].append(two((8, 8))[0])
    step(optimizer)
    assert all(p in optimizer.state for p in runs.parameters_of(optimizer))


def test_an_empty_tensor_is_no_part_of_a_flat_buffer():
    GWTAdamW([nn.Parameter(torch.randn(10)[:0])], level=1)


# Options that have no effect


@pytest.mark.parametrize(
    ("optimizer", "rule", "given", "said"),
    [
        (GWTAdamW, None, {"level": 3}, "level=2"),
        (GWTAdamW, None, {"level": 0}, "level=2"),
        (GWTAdamW, None, {"scale": 0.1}, "scale=0.25"),
        (GWTAdamW, None, {"weight_decay": 0.1}, "weight_decay=0.0"),
        (GWTMuon, "muon", {"scale": 0.5}, "scale=0.25"),
        (GWTMuon, "muon", {"weight_decay": 0.0}, "weight_decay=0.1"),
    ],
)
def test_option_that_all_groups_override_is_warned_of(
    optimizer: type[GWTAdamW], rule: str | None, given: dict[str, float], said: str
) -> None:
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 8), "norm": torch.nn.LayerNorm(8)})
    groups = gwt_param_groups(model, rule=rule, weight_decay=0.1 if rule else 0.0)
    (option,) = given
    with pytest.warns(UserWarning, match=f"{option}=.*{said}.*gwt_param_groups") as caught:
        optimizer(groups, **given)
    assert caught[0].filename == __file__


def test_option_that_a_group_takes_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(16, 8), "norm": torch.nn.LayerNorm(8)})
    GWTAdamW(gwt_param_groups(model, level=3, scale=0.1), level=3, scale=0.1, lr=0.1)
    GWTAdamW(model["mlp"].parameters(), level=0, weight_decay=0.1)
    GWTAdamW(gwt_param_groups(model, level=0), level=2)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("capturable", True), ("telemetry", True)],
)
def test_option_of_the_whole_optimizer_is_refused_in_a_group(option: str, value: object) -> None:
    p = torch.nn.Parameter(torch.ones(4, 8))
    with pytest.raises(ValueError, match=f"{option}={value} in parameter group 0 .* pass it to GWTAdamW"):
        GWTAdamW([{"params": [p], option: value}])
    GWTAdamW([{"params": [p], option: None if option == "max_grad_norm" else False}])

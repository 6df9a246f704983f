"""A state is loaded by parameter names if both sides have them, whatever the order of modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gwt_kernels import GWTAdamW, gwt_param_groups
from tests.support import runs


class Net(nn.Module):
    """Two layers of equal shapes, registered in the given order."""

    def __init__(self, order: Sequence[str] = ("a", "b"), prefix: str = "") -> None:
        super().__init__()
        layers = {}
        for i, name in enumerate(("a", "b")):
            torch.manual_seed(i)
            layers[name] = nn.Linear(16, 16)
        for name in order:
            self.add_module(prefix + name, layers[name])


def groups(net: nn.Module, reverse: bool = False) -> list[dict]:
    matrices = [(n, p) for n, p in net.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in net.named_parameters() if p.dim() == 1]
    made = [{"params": matrices, "level": 2}, {"params": vectors, "level": 0, "lr": 0.05}]
    return made[::-1] if reverse else made


def step(net: nn.Module, optimizer: GWTAdamW, t: int) -> None:
    for name, p in net.named_parameters():
        seed = 100 * t + sum(map(ord, name.replace("module.", "").replace("_orig_mod.", "")))
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def trained(net: nn.Module, made: list[dict] | None = None, **options) -> GWTAdamW:
    optimizer = GWTAdamW(groups(net) if made is None else made, lr=0.1, **options)
    for t in range(3):
        step(net, optimizer, t)
    return optimizer


def by_name(net: nn.Module, optimizer: GWTAdamW) -> dict:
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): (p.detach().clone(), dict(optimizer.state[p]))
        for name, p in sorted(net.named_parameters())
    }


def check_resumed(old_net: nn.Module, old: GWTAdamW, net: nn.Module, optimizer: GWTAdamW) -> None:
    """Load the state, and compare further steps with the uninterrupted run."""
    with torch.no_grad():
        new = dict(zip(by_name(net, optimizer), [p for _, p in sorted(net.named_parameters())], strict=True))
        for name, (value, _) in by_name(old_net, old).items():
            new[name].copy_(value)
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    for t in range(3, 5):
        step(old_net, old, t)
        step(net, optimizer, t)
    runs.assert_same_bits(by_name(net, optimizer), by_name(old_net, old))


@pytest.mark.parametrize(
    "options", [{}, {"rule": "foam", "state_dtype": torch.bfloat16}], ids=["gwt", "random bits"]
)
def test_modules_in_another_order(options):
    old_net, net = Net(), Net(("b", "a"))
    check_resumed(old_net, trained(old_net, **options), net, GWTAdamW(groups(net), lr=0.1, **options))


def test_groups_in_another_order_bring_their_options():
    old_net, net = Net(), Net(("b", "a"))
    old = trained(old_net)
    old.param_groups[1]["lr"] = 0.03
    optimizer = GWTAdamW(groups(net, reverse=True), lr=0.1)
    check_resumed(old_net, old, net, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.1]
    assert [group["level"] for group in optimizer.param_groups] == [0, 2]


def test_prefixes_of_wrappers_are_ignored():
    old_net, net = Net(), Net(("b", "a"))
    compiled = torch.compile(net)
    check_resumed(old_net, trained(old_net), compiled, GWTAdamW(groups(compiled), lr=0.1))
    old_net, net = nn.ModuleDict({"module": Net()}), Net(("b", "a"))  # names as under DistributedDataParallel
    check_resumed(old_net, trained(old_net), net, GWTAdamW(groups(net), lr=0.1))


def test_without_names_on_either_side_order_decides():
    old_net, net = Net(), Net()
    unnamed = [{**group, "params": [p for _, p in group["params"]]} for group in groups(net)]
    check_resumed(old_net, trained(old_net), net, GWTAdamW(unnamed, lr=0.1))
    old_net, net = Net(), Net()
    unnamed = [{**group, "params": [p for _, p in group["params"]]} for group in groups(old_net)]
    check_resumed(old_net, trained(old_net, unnamed), net, GWTAdamW(groups(net), lr=0.1))


def test_names_of_one_group_of_a_transformer():
    class Block(nn.Module):
        def __init__(self, order: Sequence[str]) -> None:
            super().__init__()
            for name in order:
                self.add_module(name, nn.Linear(16, 16, bias=False))

    first, second = Block(("q_proj", "k_proj")), Block(("k_proj", "q_proj"))
    for net in (first, second):
        torch.manual_seed(0)
        for _, p in sorted(net.named_parameters()):
            nn.init.normal_(p)
    options = {"include": ["proj"]}
    check_resumed(
        first, trained(first, gwt_param_groups(first, **options)), second,
        GWTAdamW(gwt_param_groups(second, **options), lr=0.1),
    )  # fmt: skip


def test_names_that_do_not_fit_are_refused_by_name():
    old_net, net = Net(), Net(prefix="new_")
    optimizer = GWTAdamW(groups(net), lr=0.1)
    with runs.refused(optimizer, ValueError, "'new_a.weight'", "'a.weight'", "migrate"):
        optimizer.load_state_dict(trained(old_net).state_dict())


def test_a_parameter_that_changed_its_group_is_refused_by_name():
    old_net, net = Net(), Net()
    (first, second), vectors = groups(net)[0]["params"], groups(net)[1]["params"]
    made = [{"params": [second], "level": 2}, {"params": [first, *vectors], "level": 0}]
    optimizer = GWTAdamW(made, lr=0.1)
    with runs.refused(optimizer, ValueError, "'a.weight'", "group 0 of the state", "group 1 of the optimizer"):
        optimizer.load_state_dict(trained(old_net).state_dict())


def test_damaged_names_are_refused():
    net = Net()
    optimizer = trained(net)
    for names, words in ((["a"], "1 names for 2"), ([1, 2], "no names"), (["b.weight", "b.weight"], "several")):
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["param_names"] = names
        with runs.refused(optimizer, ValueError, words):
            optimizer.load_state_dict(state)


def test_indices_already_matched_to_names_are_kept():
    """Check states as torch.distributed.checkpoint returns them: in the optimizer's order, with the saved names."""
    old_net, net = Net(), Net(("b", "a"))
    old, optimizer = trained(old_net), GWTAdamW(groups(net), lr=0.1)
    state = copy.deepcopy(old.state_dict())
    names = [n for group in state["param_groups"] for n in group["param_names"]]
    keyed = dict(zip([k for group in state["param_groups"] for k in group["params"]], names, strict=True))
    state["state"] = {keyed[k]: own for k, own in state["state"].items()}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved["params"] = list(group["param_names"])
    optimizer.load_state_dict(state)
    runs.assert_same_bits(
        {k: v for k, (_, v) in by_name(net, optimizer).items()},
        {k: v for k, (_, v) in by_name(old_net, old).items()},
    )
    for group in optimizer.param_groups:
        by_param = {p: n for n, p in net.named_parameters()}
        assert group["param_names"] == [by_param[p] for p in group["params"]]


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_of_modules_in_another_order():
    old_net, net = Net(), Net(("b", "a"))
    old, optimizer = trained(old_net), GWTAdamW(groups(net), lr=0.1)
    set_optimizer_state_dict(net, optimizer, get_optimizer_state_dict(old_net, old))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(old_net.get_parameter(name))
    step(old_net, old, 3)
    step(net, optimizer, 3)
    runs.assert_same_bits(by_name(net, optimizer), by_name(old_net, old))


def test_an_optimizer_loads_its_own_state_after_a_parameter_was_taken_out():
    """Check a group from which a parameter, as of a frozen layer, is removed, while its name stays, as in torch."""
    params = runs.parameters([(4, 8), (3, 8)])
    optimizer = GWTAdamW(list(zip(("first", "second"), params, strict=True)))
    runs.train(optimizer, range(2))
    del optimizer.param_groups[0]["params"][0]
    del optimizer.state[params[0]]
    other = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        runs.train(each, [2])
    runs.assert_same_bits(runs.results(optimizer), runs.results(other))

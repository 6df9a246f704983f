"""Lazy modules: before the first forward pass an error names parameter and remedy; afterwards everything works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW, gwt_param_groups, release_gradients
from gwt_kernels.plan import plan, predicted_state_bytes


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lazy modules are under development
            self.embed = nn.Embedding(8, 8)
            self.mlp = nn.LazyLinear(16)
            self.norm = nn.LazyBatchNorm1d()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp(self.embed(x)))  # type: ignore[no-any-return]


def added(model: Lazy) -> None:
    GWTAdamW(model.embed.parameters()).add_param_group({"params": [model.mlp.weight]})


def released(model: Lazy) -> None:
    release_gradients(model, GWTAdamW(model.embed.parameters()))


def frozen(model: Lazy) -> Lazy:
    for p in (*model.mlp.parameters(), *model.norm.parameters()):
        p.requires_grad = False
    return model


NAMED = "parameter 'mlp.weight' is uninitialized"
ENTRIES: dict[str, tuple[Callable[[Lazy], Any], str]] = {
    "constructor": (lambda model: GWTAdamW(model.parameters()), "parameter 1 of group 0 is uninitialized"),
    "level 0": (lambda model: GWTAdamW(model.parameters(), level=0), "parameter 1 of group 0 is uninitialized"),
    "names": (lambda model: GWTAdamW(model.named_parameters()), NAMED),
    "groups": (lambda model: GWTAdamW([{"params": model.mlp.parameters()}]), "parameter 0 of group 0 is uninit"),
    "add_param_group": (added, "parameter 0 of group 1 is uninitialized"),
    "gwt_param_groups": (gwt_param_groups, NAMED),
    "include": (lambda model: gwt_param_groups(model, include=["mlp"]), NAMED),
    "plan": (plan, NAMED),
    "plan, frozen": (lambda model: plan(frozen(model)), NAMED),
    "bytes": (lambda model: predicted_state_bytes(torch.optim.AdamW(model.named_parameters())), NAMED),
    "release": (released, NAMED),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_uninitialized_parameter_is_named_with_the_remedy(entry: str) -> None:
    call, words = ENTRIES[entry]
    with pytest.raises(RuntimeError) as caught:
        call(Lazy())
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith("run one forward pass of the model first")


@pytest.mark.parametrize("entry", ENTRIES)
def test_after_a_forward_pass_nothing_is_refused(entry: str) -> None:
    model = Lazy()
    model(torch.arange(8))
    if entry == "release":  # covers all parameters
        release_gradients(model, GWTAdamW(model.parameters(), level=0))
    else:
        ENTRIES[entry][0](model)


def test_frozen_uninitialized_parameters_are_left_out() -> None:
    model = frozen(Lazy())
    with pytest.warns(UserWarning, match="nothing to transform"):
        (group,) = gwt_param_groups(model)
    assert group["param_names"] == ["embed.weight"]


def test_a_refused_group_is_not_added() -> None:
    model = Lazy()
    optimizer = GWTAdamW(model.embed.parameters())
    with pytest.raises(RuntimeError, match="uninitialized"):
        optimizer.add_param_group({"params": list(model.mlp.parameters())})
    assert len(optimizer.param_groups) == 1
    model(torch.arange(8)).sum().backward()
    optimizer.add_param_group({"params": list(model.mlp.parameters())})
    optimizer.step()
    assert model.mlp.weight in optimizer.state

"""Arrays and tensors of several elements among the options: refused by the option's name, with nothing changed."""

import inspect

import numpy as np
import pytest
import torch

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTLion, GWTMuon

OPTIMIZERS = (GWTAdamW, GWTMuon, GWTAdafactor, GWTLion, GWTAdamMini)
ARRAYS = {"array": np.zeros(2), "tensor": torch.zeros(2)}


def parameter():
    return torch.nn.Parameter(torch.ones(8, 32))


def options(kind):
    return [name for name in inspect.signature(kind).parameters if name != "params"]


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_of_a_constructor(kind, value):
    for name in options(kind):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            kind([parameter()], **{name: value})


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_of_an_added_group(kind, value):
    optimizer = kind([parameter()])
    for name in options(kind):
        if name in optimizer.param_groups[0]:
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                optimizer.add_param_group({"params": [parameter()], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_in_mid_run(kind, value):
    p = parameter()
    optimizer = kind([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, group = p.detach().clone(), optimizer.param_groups[0]
    for name in options(kind):
        if name in group:
            kept, group[name] = group[name], value
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                optimizer.step()
            group[name] = kept
    assert torch.equal(p, before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    optimizer.step()
    assert not torch.equal(p, before)

"""Bad parameters and gradients are refused with a clear message, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW
from tests.support.runs import BACKENDS, checked_step, give_gradients, parameters, place, refused, train

BAD_PARAMETERS = {
    "integers": (torch.ones(3, 8, dtype=torch.int64), TypeError, ("torch.int64", "leave it out")),
    "booleans": (torch.ones(3, 8, dtype=torch.bool), TypeError, ("torch.bool", "leave it out")),
    "complex": (torch.ones(3, 8, dtype=torch.complex64), TypeError, ("torch.complex64", "leave it out")),
    "sparse": (torch.ones(3, 8).to_sparse(), TypeError, ("torch.sparse_coo", "to_dense()")),
    "expanded": (torch.ones(1, 8).expand(3, 8), ValueError, ("(0, 1)", "share memory", "clone()")),
    "of one byte": (torch.ones(3, 8).to(torch.float8_e4m3fn), TypeError, ("torch.float8_e4m3fn", "torch.bfloat16")),
    "a scalar": (torch.ones(()), ValueError, ("level 2", "()", "level 0 or less")),
    "too narrow": (torch.ones(8, 1), ValueError, ("level 2", "(8, 1)", "level 0 or less")),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_bad_parameters_are_refused_by_index_or_name(kind):
    tensor, error, words = BAD_PARAMETERS[kind]
    good = parameters([(3, 8)])[0]
    with pytest.raises(error) as caught:
        GWTAdamW([good, tensor])
    assert all(word in str(caught.value) for word in ("parameter 1 of group 0", *words)), str(caught.value)
    with pytest.raises(error) as caught:
        GWTAdamW([("good.weight", good), ("bad.weight", tensor)])
    assert all(word in str(caught.value) for word in ("'bad.weight'", *words)), str(caught.value)
    optimizer = GWTAdamW([good])
    with pytest.raises(error, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [tensor], "level": 2})
    assert len(optimizer.param_groups) == 1


def test_input_refused_by_torch_is_refused():
    good = parameters([(3, 8)])[0]
    with pytest.raises(ValueError, match="empty parameter list"):
        GWTAdamW([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        GWTAdamW(good)
    with pytest.raises(TypeError, match="ordered collections"):
        GWTAdamW([{"params": {good}}])
    with pytest.raises(ValueError, match="non-leaf"):
        GWTAdamW([good * 2])
    with pytest.raises(TypeError, match="positional"):
        GWTAdamW([good], 1e-3, (0.9, 0.999), 1e-6, 0.0, 2)


# Gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("started", [False, True])
def test_sparse_gradients_are_refused(backend, device, started):
    on = place(backend, device)
    dense = parameters([(4, 8)], on)[0]
    embedding = nn.Embedding(6, 8, sparse=True, device=on)
    optimizer = GWTAdamW([("dense", dense), ("tokens", embedding.weight)], lr=0.1, backend=backend)
    if started:
        train(optimizer, range(1))
        optimizer.zero_grad()
    (embedding(torch.tensor([1, 3], device=on)).sum() + dense.sum()).backward()
    with refused(optimizer, RuntimeError, "'tokens'", "(6, 8)", "sparse_coo", "sparse=False", "SparseAdam"):
        optimizer.step()
    embedding.weight.grad = embedding.weight.grad.to_dense()
    assert checked_step(optimizer) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_gradients_that_are_not_real_numbers_are_refused(backend, device, dtype):
    params = parameters([(4, 8), (3, 8)], place(backend, device))
    optimizer = GWTAdamW(params, lr=0.1, backend=backend)
    train(optimizer, range(1))
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = torch.ones(3, 8, dtype=dtype, device=params[1].device)
    with refused(optimizer, RuntimeError, "parameter 1 of group 0", str(dtype), "real"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_changed_shape_or_kind_is_refused(backend, device):
    on = place(backend, device)
    params = parameters([(4, 8), (4, 8)], on)
    optimizer = GWTAdamW(params, lr=0.1, level=1, backend=backend)
    train(optimizer, range(1))
    data = params[1].data
    for shape, word in (((8, 4), "(8, 2)"), ((8, 8), "(8, 4)"), ((32, 1), "level 1 is too deep")):
        params[1].grad = None
        params[1].data = torch.ones(shape, device=on)
        give_gradients(params, seed=1)
        with refused(optimizer, ValueError, "parameter 1 of group 0", word):
            optimizer.step()
    params[1].data = data.clone()  # while the gradient still has the other shape
    with refused(optimizer, RuntimeError, "parameter 1 of group 0", "(32, 1)", "backward"):
        optimizer.step()
    give_gradients(params, seed=2)
    assert checked_step(optimizer) == 2

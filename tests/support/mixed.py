"""An optimizer over groups of several levels and dtypes, for tests of what it saves, and ways to save it."""

from __future__ import annotations

import io

import torch

from gwt_kernels import GWTAdamW
from tests.support.runs import CPU, parameters, parameters_of

SHAPES = ((4, 8), (3, 6), (2, 3, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def model(on=CPU, backend=None, dtypes=DTYPES[:3], lr=0.1, **options):
    """Build an optimizer over groups of level 0, 1 and 2 in several dtypes, and one unused parameter."""
    if backend == "triton":  # the interpreter is slow
        dtypes = dtypes[1:2]
    groups = [
        {
            "params": [p for d in dtypes for p in parameters(SHAPES[:2], on, d)],
            "level": level,
            "weight_decay": 0.1 * level,
        }
        for level in (0, 1, 2)
    ]
    groups.append({"params": parameters([(2, 2)], on), "level": 1, "norm_growth_limit": None})
    return GWTAdamW(groups, lr=lr, backend=backend, **options)


def used(optimizer):
    return parameters_of(optimizer)[:-1]


def through_a_file(state_dict, **options):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def copy_weights(source, target):
    with torch.no_grad():
        for p, q in zip(parameters_of(source), parameters_of(target), strict=True):
            q.copy_(p)

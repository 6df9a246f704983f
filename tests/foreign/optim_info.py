"""GWTAdamW as torch's OptimizerInfo describes an optimizer: its inputs, its errors and its schedulers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import hypothesis
import pytest
import torch

from gwt_kernels import GWTAdamW
from tests.support.runs import parameters

pytest.importorskip("expecttest", reason="torch.testing._internal needs it: pip install expecttest")
common = importlib.import_module("torch.testing._internal.common_optimizers")
hypothesis.settings.load_profile("default")  # that module loads a profile of ten examples

OptimizerInput, ErrorOptimizerInput = common.OptimizerInput, common.ErrorOptimizerInput
SHAPES = [(10, 5), (10,)]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor lr and betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor([0.99]))},
    "no first moment": {"betas": (0.0, 0.99)},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "level 0": {"level": 0},
    "deepest level": {"level": 3},
    "folded rule": {"rule": "foam"},
    "no limiter": {"norm_growth_limit": None},
    "uncorrected bias": {"correct_bias": False},
    "bfloat16 moments": {"state_dtype": torch.bfloat16, "seed": 7},
    "int8 moments": {"state_dtype": torch.int8},  # tensors as small as these keep float32 moments
    "another wavelet": {"wavelet": "db2", "level": 1},
    "another boundary": {"boundary": "symmetric", "level": 1},
    "torch backend": {"backend": "torch"},
    "clipped": {"max_grad_norm": 0.5},
    "skips": {"skip_nonfinite": True},
    "telemetry": {"telemetry": True},
}
AFTER_THE_FIRST_RELEASE = ("maximize", "boundary", "correct_bias", "weight_rounding", "seed", "backend")
"""Options that a checkpoint of an older version may lack."""


def inputs(device: Any, dtype: Any = None) -> list[Any]:
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in OPTIONS.items()]


def error_inputs(device: Any, dtype: torch.dtype) -> list[Any]:
    """Yield the errors of every torch optimizer, at level 0 since the samples have width 1, and further ones."""
    shared = common.get_error_inputs_for_all_optims(device, dtype)
    for error in shared:
        error.optimizer_error_input.kwargs["level"] = 0
        if "Tensor lr" in error.error_regex:  # the message differs
            error.error_regex = "lr must be one number"
    own: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"betas": (1.0, 0.0)}, ValueError, r"betas\[0\] must be at least 0 and below 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be at least 0 and below 1, got -0.1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be finite and at least 0, got -1"),
        ({"eps": -1e-8}, ValueError, "eps must be finite and at least 0"),
        ({"lr": "1e-3"}, TypeError, "lr must be a real number"),
        ({"level": 4}, ValueError, "level 4 is too deep for parameter 0 of group 0 of shape"),
        ({"scale": 0.0}, ValueError, "scale must be finite and above 0"),
        ({"rule": "adam"}, ValueError, "rule"),
        ({"wavelet": "db0"}, ValueError, "wavelet 'db0'"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0"),
        ({"foreach": True}, TypeError, "foreach"),
    ]
    return shared + [
        ErrorOptimizerInput(OptimizerInput(None, kwargs, str(kwargs)), error_type=kind, error_regex=words)
        for kwargs, kind, words in own
    ]


(ADAM,) = (info for info in common.optim_db if info.optim_cls is torch.optim.Adam)
INFO = common.OptimizerInfo(
    GWTAdamW,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=ADAM.scheduler_inputs,
    supported_impls=(),
    not_og_supported_flags=AFTER_THE_FIRST_RELEASE,
    supports_complex=False,
)
INPUTS = common._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)
each_input = pytest.mark.parametrize("sample", INPUTS, ids=lambda sample: sample.desc)


def make(sample: Any, params: Any = None, **more: Any) -> GWTAdamW:
    """Build the optimizer of an input; a tensor among its options is copied, since schedulers write to it."""
    options = {**copy.deepcopy(sample.kwargs), **more}
    optimizer: GWTAdamW = INFO.optim_cls(parameters(SHAPES) if params is None else params, **options)
    return optimizer

"""The step as a function refuses wrong arguments by name, before it changes anything."""

from __future__ import annotations

import math

import pytest
import torch

from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.test_functional import backends


def arguments(**changed) -> dict:
    own = {
        "params": [torch.ones(2, 8)],
        "grads": [torch.ones(2, 8)],
        "exp_avgs": [torch.zeros(2, 2)],
        "exp_avg_sqs": [torch.zeros(2, 2)],
        "limiter_norms": [None],
        "steps": [1],
        "hypers": [Hyper()],
        "level": 2,
    }
    return own | changed


def test_empty_lists_are_accepted():
    nothing = {name: [] for name in arguments() if name != "level"}
    gwt_adamw_(**nothing, level=2)


@pytest.mark.parametrize("name", ["grads", "exp_avgs", "exp_avg_sqs", "limiter_norms", "steps", "hypers"])
def test_lists_of_different_lengths_are_refused(name):
    before = arguments()
    with pytest.raises(ValueError, match="1 params need as many of all else"):
        gwt_adamw_(**(before | {name: before[name] * 2}))
    assert torch.equal(before["params"][0], torch.ones(2, 8))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"backend": "triton", "wavelet": "db2"}, RuntimeError, "know the Haar wavelet only, not 'db2'"),
        ({"wavelet": "nonsense"}, ValueError, "unknown wavelet 'nonsense'"),
        ({"boundary": "edge"}, ValueError, "unknown boundary 'edge': use one of 'zero', 'constant', 'symmetric'"),
        ({"boundary": ["zero"]}, ValueError, "unknown boundary"),
        ({"backend": "triton", "boundary": "reflect"}, RuntimeError, "know boundary='zero' only, not 'reflect'"),
        ({"rule": "foam", "boundary": "reflect"}, ValueError, "knows no boundary 'reflect': use wavelet='haar'"),
        ({"params": [torch.ones(2, 8).double()], "backend": "triton"}, RuntimeError, "torch.float64 would lose"),
        ({"rule": "nonsense"}, ValueError, "unknown rule 'nonsense': use one of"),
        ({"rule": ["gwt"]}, ValueError, r"unknown rule \['gwt'\]"),
        ({"levels": 2}, TypeError, "gwt_adamw_ has no option 'levels': it has limiter_norms"),
        ({"level": -1}, ValueError, "level must not be negative, got -1"),
        ({"level": 2.0}, TypeError, "level must be an integer or 'row', got 2.0"),
        ({"level": 10**30}, ValueError, "level must be at most 62, got 10"),
        ({"workspace": []}, TypeError, "workspace must be a dict or None, got list"),
        ({"grads": None}, TypeError, "grads must be a list of tensors, got NoneType"),
        ({"wavelet": ["haar"]}, TypeError, r"wavelet must be the name of a wavelet, got \['haar'\]"),
        ({"lows": 5}, TypeError, "lows must be None or a list with an entry for each parameter, got int"),
        ({"spans": 5}, TypeError, "spans must be None or a list with an entry for each parameter, got int"),
        ({"spans": ["x"]}, TypeError, r"spans\[0\] must be None or a pair of Span, .* got 'x'"),
        ({"spans": [(1, 2)]}, TypeError, r"spans\[0\] must be None or a pair of Span, .* got \(1, 2\)"),
        ({"exp_avgs": None}, ValueError, "rule='gwt' keeps exp_avg and exp_avg_sq"),
    ],
)
def test_unsupported_arguments_are_refused(changed, error, message):
    if changed.get("wavelet") == "nonsense":
        pytest.importorskip("pywt", reason="needs PyWavelets: pip install -e '.[test]'")
    before = arguments(**changed)
    with pytest.raises(error, match=message):
        gwt_adamw_(**before)
    assert torch.equal(before["params"][0], torch.ones_like(before["params"][0]))


def wrong(name: str, x: object) -> dict:
    """Return arguments of two tensors, the second of which is wrong in one list."""
    two = {key: [torch.ones_like(own[0]) if torch.is_tensor(own[0]) else own[0] for _ in range(2)]
           for key, own in arguments().items() if key != "level"}  # fmt: skip
    two |= {"limiter_norms": [torch.zeros(()) for _ in range(2)]}
    return two | {"level": 2, name: [two[name][0], x]}


@backends
@pytest.mark.parametrize(
    ("name", "x", "error", "message"),
    [
        ("grads", None, TypeError, r"grads\[1\] must be a dense tensor, got NoneType: leave parameters without"),
        (
            "grads",
            torch.eye(8)[:2].to_sparse(),
            TypeError,
            r"grads\[1\] must be a dense tensor, got torch.sparse_coo",
        ),
        (
            "grads",
            torch.ones(2, 8, dtype=torch.int64),
            TypeError,
            r"grads\[1\] must be a real floating-point tensor",
        ),
        ("grads", torch.ones(2, 8) + 0j, TypeError, r"grads\[1\] must be a real .* got torch.complex64"),
        ("grads", torch.ones(1, 8), ValueError, r"needs a gradient of its shape .*, got \(1, 8\)"),
        ("params", torch.ones(2, 8, dtype=torch.int32), TypeError, r"params\[1\] must be a real floating-point"),
        ("grads", torch.ones(2, 8).to(torch.float8_e5m2), TypeError, r"grads\[1\] must be .* of 16 bits or more"),
        ("params", torch.ones(2, 8).double(), ValueError, "a bucket has one device, and one dtype each"),
        (
            "params",
            torch.ones(1, 8).expand(2, 8),
            ValueError,
            r"params\[1\] has strides \(0, 1\), so elements share",
        ),
        ("exp_avgs", torch.zeros(2, 3), ValueError, r"needs .* moments of shape \(2, 2\), got"),
        ("exp_avgs", torch.zeros(2, 2).t(), ValueError, "must be contiguous"),
        ("limiter_norms", torch.zeros(3), ValueError, r"limiter_norms\[1\] must be a floating-point scalar on"),
        ("limiter_norms", 0.0, ValueError, r"limiter_norms\[1\] must be a floating-point scalar on"),
        ("steps", 0, ValueError, r"steps\[1\] must be at least 1, which is the first step, got 0"),
        ("steps", 1.0, TypeError, r"steps\[1\] must be an integer, 1 for the first step, got 1.0"),
        ("hypers", {"lr": 0.1}, TypeError, "hypers must be gwt_kernels.functional.Hyper, got dict"),
        ("hypers", Hyper(lr=math.nan), ValueError, "lr must be at least 0 and finite, got nan"),
        ("hypers", Hyper(lr="0.1"), TypeError, "lr must be a real number, got '0.1'"),
        ("hypers", Hyper(beta2=1.0), ValueError, "beta2 must be at least 0 and below 1, got 1.0"),
        ("hypers", Hyper(scale=-1.0), ValueError, "scale must be at least 0 and finite, got -1.0"),
        ("hypers", Hyper(detail_scale=math.inf), ValueError, "detail_scale must be at least 0 and finite, got inf"),
        ("hypers", Hyper(grad_factor=math.nan), ValueError, "grad_factor must be at least 0 and finite, got nan"),
    ],
)
def test_wrong_arguments_change_nothing(backend, name, x, error, message):
    """Check that a valid first tensor is unchanged if the second is wrong, on every backend."""
    given = wrong(name, x)
    first = [given[key][0] for key in ("params", "exp_avgs", "exp_avg_sqs", "limiter_norms")]
    before = [tensor.clone() for tensor in first]
    with pytest.raises(error, match=message):
        gwt_adamw_(**given, backend=backend)
    assert all(map(torch.equal, first, before))


@pytest.mark.parametrize("backend", ["torch", "compiled"])  # Triton has checks of its own
@pytest.mark.parametrize(
    "second",
    [
        torch.zeros(2, 1, device="meta"),
        torch.zeros(2, 1, dtype=torch.float64),
        torch.zeros(1, 1).expand(2, 1),
        torch.zeros(2, 3)[:, :1],
        torch.zeros(1, 2),
        torch.zeros(2),
    ],
    ids=["elsewhere", "float64", "expanded", "strided", "transposed", "flat"],
)
def test_wrong_second_moments_of_rows_change_nothing(backend, second):
    given = wrong("limiter_norms", torch.zeros(())) | {"limiter_norms": None, "rule": "adam_mini"}
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[1\] must be a contiguous float32 tensor on cpu"):
        gwt_adamw_(**given | {"exp_avg_sqs": [torch.zeros(2, 1), second]}, backend=backend)
    assert torch.equal(given["params"][0], torch.ones(2, 8))
    for fitting in (torch.zeros(2, 1), torch.zeros(1, 1)):
        gwt_adamw_(**given | {"exp_avg_sqs": [torch.zeros(2, 1), fitting]}, backend=backend)


@pytest.mark.parametrize(("rule", "optimizer"), [("adafactor", "GWTAdafactor"), ("muon", "GWTMuon")])
def test_rules_that_are_no_step_of_elements_name_their_optimizer(rule, optimizer):
    with pytest.raises(ValueError, match=f"rule={rule!r} .*: use gwt_kernels.{optimizer}"):
        gwt_adamw_(**wrong("steps", 1), rule=rule)


@backends
@pytest.mark.parametrize(
    ("option", "x", "message"),
    [
        ("telemetry", torch.zeros(2, 6), "telemetry must be a contiguous float64 tensor of shape"),
        ("telemetry", torch.zeros(2, 5).double(), "telemetry must be a contiguous float64 tensor of shape"),
        ("limits", torch.ones(2), "limits take the place of limiter_norms: pass None"),
        ("control", torch.ones(3).double(), "control goes with steps that the device counts"),
        ("keys", [0, -1], r"keys\[1\] must be what gwt_kernels.core.hyper.key_of returns, got -1"),
        ("steps", torch.zeros(2, 1).double(), r"steps must be a contiguous float64 tensor of shape \(2,\)"),
    ],
)
def test_wrong_numbers_of_a_step_change_nothing(backend, option, x, message):
    given = wrong("hypers", Hyper()) | {option: x}
    with pytest.raises(ValueError, match=message):
        gwt_adamw_(**given, backend=backend)
    assert torch.equal(given["params"][0], torch.ones(2, 8))


@backends
def test_a_tensor_is_written_once(backend):
    """Check refusals of one tensor as two arguments, such as both moments."""
    given = wrong("hypers", Hyper())
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is exp_avgs\[0\] once more: a step writes each"):
        gwt_adamw_(**given | {"exp_avg_sqs": given["exp_avgs"]}, backend=backend)
    with pytest.raises(ValueError, match=r"params\[1\] is params\[0\] once more"):
        gwt_adamw_(**given | {"params": given["params"][:1] * 2}, backend=backend)


def test_autograd_does_not_record_the_step():
    p = torch.ones(2, 8, requires_grad=True)
    gwt_adamw_(**arguments(params=[p]))
    assert p.grad_fn is None
    assert not torch.equal(p.detach(), torch.ones(2, 8))

"""Traced steps go through PyTorch's operators or are refused, and never silently do nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gwt_kernels import GWTAdamW, GWTMuon
from gwt_kernels.backends import choice
from gwt_kernels.functional import Hyper, gwt_adamw_
from tests.support import runs
from tests.support.steps import update_sums

SHAPES = ((16, 16), (8, 12), (7,))
OPTIONS = {
    "plain": {},
    "limiter off": {"norm_growth_limit": None},
    "folded": {"rule": "foam"},
    "level 0": {"level": 0},
    "clipping": {"max_grad_norm": 1.0},
    "measuring": {"max_grad_norm": float("inf")},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
    "stochastic": {"weight_rounding": "stochastic"},
    "split": {"weight_rounding": "split"},
    "wavelet": {"wavelet": "db2"},
    "telemetry": {"telemetry": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
modes = pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])


def dtype_for(options: dict) -> torch.dtype:
    return torch.bfloat16 if "weight_rounding" in options else torch.float32


@every_option
@pytest.mark.parametrize("on", ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])])
def test_fake_tensors_are_stepped(on, options):
    """Check steps on fake tensors, as in memory estimators: results have the shapes and dtypes of a real step."""
    real = GWTAdamW(runs.parameters(SHAPES, dtype=dtype_for(options)), backend="torch", **options)
    runs.train(real, range(2))
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s, dtype=dtype_for(options), device=on)) for s in SHAPES]
        optimizer = GWTAdamW(params, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    for p, q in zip(params, runs.parameters_of(real), strict=True):
        made, expected = optimizer.state[p], real.state[q]
        assert {k: (x.shape, x.dtype) for k, x in made.items()} == {
            k: (x.shape, x.dtype) for k, x in expected.items()
        }
        assert isinstance(made["exp_avg"], FakeTensor)
        assert float(made["step"]) == 2
        assert made["exp_avg"].device.type == on


@every_option
def test_meta_tensors_are_stepped(options):
    params = [nn.Parameter(torch.empty(s, dtype=dtype_for(options), device="meta")) for s in SHAPES]
    optimizer = GWTAdamW(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [3, 3, 3]
    assert all(state["exp_avg"].is_meta for state in optimizer.state.values())


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"max_grad_norm": 1.0, "skip_nonfinite": True}])
def test_a_skippable_step_of_fake_tensors_is_traced(options):
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(8, 8))
        optimizer = GWTAdamW([p], **options)
        p.grad = torch.empty(8, 8)
        optimizer.step()
    assert isinstance(optimizer.state[p]["exp_avg"], FakeTensor)


def arguments(level: int, limited: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = -(-10 // 2**level)
    shapes = [(6, 10), (6, 10), (6, width), (6, width), ()]
    return [torch.randn(s, generator=generator).abs_() + 0.1 for s in shapes]


@modes
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_a_graph_of_the_function_updates(rule, level, mode):
    limited = rule == "gwt" and level > 0

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, norm: Tensor) -> Tensor:
        gwt_adamw_(
            params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=[v], limiter_norms=[norm if limited else None],
            steps=[3], hypers=[Hyper(lr=0.1)], level=level, rule=rule,
        )  # fmt: skip
        return p

    graph = make_fx(step, tracing_mode=mode)(*arguments(level, limited))
    got, expected, before = (arguments(level, limited, seed=1) for _ in range(3))
    graph(*got)
    with torch.no_grad():
        gwt_adamw_(
            params=[expected[0]], grads=[expected[1]], exp_avgs=[expected[2]], exp_avg_sqs=[expected[3]],
            limiter_norms=[expected[4] if limited else None], steps=[3], hypers=[Hyper(lr=0.1)], level=level,
            rule=rule, backend="torch",
        )  # fmt: skip
    assert not torch.equal(got[0], before[0])
    runs.assert_same_bits(got, expected)


@modes
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5}, {"rule": "foam"}], ids=["plain", "clipping", "folded"]
)
def test_a_graph_of_a_step_updates(options, mode):
    """Check a graph, which holds the optimizer's tensors and the bias correction of the traced step."""
    (p,), (q,) = runs.parameters([(8, 8)]), runs.parameters([(8, 8)])
    traced, expected = GWTAdamW([p], lr=0.1, **options), GWTAdamW([q], lr=0.1, backend="torch", **options)
    for optimizer in (traced, expected):
        runs.train(optimizer, range(1))
    runs.train(traced, [0])  # an optimizer that has taken steps in C
    traced.load_state_dict(expected.state_dict())
    before = runs.results(expected)
    with torch.no_grad():
        p.copy_(q)

    def step(g: Tensor) -> Tensor:
        p.grad = g
        traced.step()
        return p

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.ones(8, 8))
    p.grad = None
    runs.train(expected, [1])
    with torch.no_grad():  # tensors left by tracing, real or not, are replaced by the original ones
        p.copy_(before["params"][0])
        for key, value in before["state"][0].items():
            traced.state[p][key].copy_(value)
        graph(q.grad)
    assert {type(x) for x in traced.state[p].values()} == {Tensor}
    runs.assert_differ(runs.results(traced), before)
    torch.testing.assert_close(p, q)
    for key, value in expected.state[q].items():
        torch.testing.assert_close(traced.state[p][key], value)
    runs.train(traced, [2])  # and real steps continue
    assert float(traced.state[p]["step"]) == 3


@modes
def test_a_graph_that_could_not_skip_is_refused(mode):
    (p,) = runs.parameters([(8, 8)])
    optimizer = GWTAdamW([p], skip_nonfinite=True)
    runs.train(optimizer, range(1))

    def step(g: Tensor) -> Tensor:
        p.grad = g
        optimizer.step()
        return p

    with pytest.raises(RuntimeError, match="cannot skip a step"):
        make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.ones(8, 8))


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_an_explicit_backend_is_refused_if_tracing_would_miss_it(backend):
    def step(p: Tensor, g: Tensor) -> Tensor:
        m = p.new_zeros(4, 4)
        gwt_adamw_(
            params=[p], grads=[g], exp_avgs=[m], exp_avg_sqs=[m.clone()], limiter_norms=[None], steps=[1],
            hypers=[Hyper()], level=1, backend=backend,
        )  # fmt: skip
        return p

    for trace in (make_fx, torch.func.functionalize, torch.vmap):
        with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot run under .*backend=None"):
            trace(step)(torch.zeros(2, 4, 8), torch.ones(2, 4, 8))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="under FakeTensorMode"):
        step(torch.zeros(4, 8), torch.ones(4, 8))


class Seen(TorchDispatchMode):
    """Record the operators that change a tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.writes.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=["plain", "skipping"])
def test_a_users_dispatch_mode_sees_the_update(options):
    """Check a mode in which tensors are real, so that steps are counted, clipped and skipped as usual."""
    optimizer, expected = (GWTAdamW(runs.parameters(SHAPES), backend=b, **options) for b in (None, "torch"))
    runs.train(optimizer, range(2))
    runs.train(expected, range(2))
    with Seen() as seen:
        runs.train(optimizer, [2])
        for p in runs.parameters_of(optimizer):
            p.grad.fill_(float("nan") if options else 1)
        optimizer.step()
    assert all(p.data_ptr() in seen.writes for p in runs.parameters_of(optimizer))
    runs.train(expected, [2])
    for p in runs.parameters_of(expected):
        p.grad.fill_(float("nan") if options else 1)
    expected.step()
    assert [float(s["step"]) for s in optimizer.state.values()] == [
        float(s["step"]) for s in expected.state.values()
    ]
    assert float(optimizer.skipped_steps) == float(expected.skipped_steps) == (1 if options else 0)
    for p, q in zip(runs.parameters_of(optimizer), runs.parameters_of(expected), strict=True):
        torch.testing.assert_close(p, q)


def test_a_memory_tracker_sees_the_step():
    model = nn.Linear(64, 64)
    optimizer = GWTAdamW(model.parameters(), level=0)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        assert choice.tracer() == "MemTracker"
    snapshot = tracker.get_tracker_snapshot("current")
    states = {str(kind): size for kind, size in snapshot[torch.device("cpu")].items()}
    assert sum(size for kind, size in states.items() if "Optstate" in kind or "OPT" in kind) >= 2 * 4 * 64 * 65


def test_a_step_of_functional_tensors_uses_pytorchs_operators():
    with FunctionalTensorMode():
        assert choice.tracer() == "FunctionalTensorMode"
        assert choice.resolve_update(None, torch.device("cuda"), torch.float32, 2) == "torch"


def test_sums_of_fake_tensors_have_their_shapes():
    with FakeTensorMode():
        p, m = torch.empty(4, 8), torch.empty(4, 2)
        sums = update_sums(
            params=[p],
            grads=[p.clone()],
            exp_avgs=[m],
            exp_avg_sqs=[m.clone()],
            steps=[1],
            hypers=[Hyper()],
            level=2,
        )
    assert sums.shape == (1,)


def test_real_steps_run_in_c_again_after_tracing():
    (p,), (q,) = runs.parameters([(8, 8)]), runs.parameters([(8, 8)])
    traced, expected = GWTAdamW([p], lr=0.1, backend=None), GWTAdamW([q], lr=0.1, backend=None)
    for optimizer in (traced, expected):
        runs.train(optimizer, range(2))
    grad = p.grad
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = nn.Parameter(mode.from_tensor(p.detach()))
        other = GWTAdamW([fake])
        fake.grad = torch.ones(8, 8)
        other.step()
    p.grad = grad
    for optimizer in (traced, expected):
        runs.train(optimizer, [2])
    runs.assert_same_bits(runs.results(traced), runs.results(expected))


MATRICES = ((16, 16), (8, 12), (2, 4, 16))


def muon(params, **options):
    return GWTMuon(params, lr=0.01, **options)


@pytest.mark.parametrize("options", [{}, {"level": 0}, {"max_grad_norm": 1.0}, {"telemetry": True}], ids=str)
@modes
def test_a_graph_of_a_step_of_muon_is_the_step(options, mode):
    traced, plain = muon(runs.parameters([(8, 16)]), **options), muon(runs.parameters([(8, 16)]), **options)
    for each in (traced, plain):
        runs.train(each, range(1))
    (p,), (q,) = runs.parameters_of(traced), runs.parameters_of(plain)
    before = runs.results(traced)

    def step(g):
        p.grad = g
        traced.step()
        return p.detach().clone()

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.ones(8, 16))
    with torch.no_grad():  # what real tensors were changed by tracing
        p.copy_(before["params"][0])
        traced.state[p]["exp_avg"].copy_(before["state"][0]["exp_avg"])
    g = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = graph(g)
    q.grad = g
    plain.step()
    torch.testing.assert_close(got, q.detach(), rtol=1e-6, atol=1e-7)


def test_fake_matrices_are_stepped():
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s)) for s in MATRICES]
        optimizer = muon(params, skip_nonfinite=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert [optimizer.state[p]["exp_avg"].shape[-1] for p in params] == [4, 3, 4]

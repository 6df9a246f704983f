"""Tests groups at ``level="row"``: state, checkpoints, migration, planner, telemetry and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from gwt_kernels import GWTAdamW, GWTLion, gwt_param_groups, haar_dwt, migrate
from gwt_kernels.cli import main
from gwt_kernels.functional import Hyper, gwt_adamw_
from gwt_kernels.plan import plan, predicted_state_bytes

SHAPES = ((64, 96), (33, 70), (128,), (3, 4, 5), (), (0, 7))


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def steps(optimizer, params, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.int8])
def test_a_row_has_two_numbers_of_state(rule, state_dtype):
    params = parameters(shapes=(*SHAPES, (5000, 8)))
    optimizer = GWTAdamW(params, level="row", rule=rule, state_dtype=state_dtype)
    steps(optimizer, params, 2)
    for p in params:
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", *(["limiter_norm"] if rule == "gwt" else [])}
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == ((*p.shape[:-1], 1) if p.dim() else ())
            assert state[key].dtype == (torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32)
    held = sum(x.numel() * x.element_size() for p in params for x in optimizer.state[p].values())
    assert held == predicted_state_bytes(optimizer)


@pytest.mark.parametrize("rule", ["gwt", "foam"])
def test_rows_of_a_power_of_two_are_blocks_of_that_level(rule):
    both = [parameters(torch.float64, ((9, 64), (2, 3, 64))) for _ in range(2)]
    for params, level in zip(both, (6, "row"), strict=True):
        steps(GWTAdamW(params, level=level, rule=rule, weight_decay=0.1, maximize=True), params, 4)
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_lion_on_rows_is_that_of_blocks_as_long():
    both = [parameters(torch.float64, ((9, 64),)) for _ in range(2)]
    for params, level in zip(both, (6, "row"), strict=True):
        steps(GWTLion(params, level=level), params, 4)
    torch.testing.assert_close(*(params[0] for params in both), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounding", [None, "stochastic", "split"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_checkpoints_of_rows_resume_bit_for_bit(state_dtype, rounding):
    params = parameters(torch.bfloat16)
    options = {"level": "row", "rule": "gwt", "state_dtype": state_dtype, "weight_rounding": rounding}
    optimizer = GWTAdamW(params, **options)
    steps(optimizer, params, 3)
    resumed = copy.deepcopy(params)
    again = GWTAdamW(resumed, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, params, 2, seed=5)
    steps(again, resumed, 2, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    with pytest.raises(ValueError, match="level='row', the optimizer level=2"):
        GWTAdamW(parameters(torch.bfloat16, ((64, 96),)), level=2).load_state_dict(
            {
                **optimizer.state_dict(),
                "param_groups": [{**optimizer.state_dict()["param_groups"][0], "params": [0]}],
            }
        )


def test_chunks_of_rows_make_no_difference(monkeypatch):
    from gwt_kernels.backends.torch import step

    results = []
    for chunk in (step.CHUNK, 100):
        monkeypatch.setattr(step, "CHUNK", chunk)
        params = parameters(torch.float64, ((24, 40), (3, 8, 10), (300, 1), (500,)))
        params.append(nn.Parameter(params[0].detach().T.contiguous().T))
        steps(GWTAdamW(params, level="row", backend="torch"), params, 3)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", ["gwt", "foam"])
@pytest.mark.parametrize("width", [64, 70])
def test_migration_to_rows_keeps_the_means_of_rows_and_back_spreads_them(rule, width):
    params = parameters(torch.float64, ((6, width),))
    start = GWTAdamW(params, level=0)
    steps(start, params, 3)
    through, direct, back = (GWTAdamW(params, level=level, rule=rule) for level in (3, "row", 0))
    rows = GWTAdamW(params, level="row", rule=rule)
    for other, source in ((through, start), (direct, start), (rows, through), (back, rows)):
        made = migrate(source.state_dict(), other)
        other.load_state_dict(made.state_dict)
    p, unit = params[0], width**0.5 if rule == "gwt" else 1.0
    mean = start.state[p]["exp_avg"].mean(-1, keepdim=True)
    for optimizer in (direct, rows):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], mean * unit)
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg_sq"], start.state[p]["exp_avg_sq"].mean(-1, keepdim=True)
        )
    torch.testing.assert_close(back.state[p]["exp_avg"], mean.expand(6, width).contiguous())
    assert "level row" in str(migrate(rows.state_dict(), through))
    assert "spread evenly" in str(migrate(rows.state_dict(), through))
    through.load_state_dict(migrate(rows.state_dict(), through).state_dict)
    again = GWTAdamW(params, level="row", rule=rule)
    again.load_state_dict(migrate(through.state_dict(), again).state_dict)
    torch.testing.assert_close(again.state[p]["exp_avg"], mean * unit)


def test_migration_takes_every_shape_to_rows_and_back():
    params = parameters()
    start, rows, back = (GWTAdamW(params, level=level) for level in (0, "row", 0))
    steps(start, params, 2)
    rows.load_state_dict(migrate(start.state_dict(), rows).state_dict)
    steps(rows, params, 1)
    back.load_state_dict(migrate(rows.state_dict(), back).state_dict)
    steps(back, params, 1)
    assert all(back.state[p]["exp_avg"].shape == p.shape for p in params)


def model():
    torch.manual_seed(0)
    found = nn.Module()
    found.layers = nn.ModuleList(
        nn.ModuleDict({"proj": nn.Linear(12, 1), "up": nn.Linear(7, 16)}) for _ in range(2)
    )
    return found


def test_groups_and_plans_of_rows():
    groups = gwt_param_groups(model(), level="row", include=["proj.weight"])
    assert [group["level"] for group in groups] == ["row", 0]
    optimizer = GWTAdamW(groups, rule="foam")
    planned = plan(model(), level="row", rule="foam", include=["proj.weight"], dtype=torch.float32)
    assert planned.chosen.state_bytes == predicted_state_bytes(optimizer)
    assert "GWT level row" in str(planned)
    assert "row" in planned.text(verbose=True)
    assert [cost.level for cost in planned.options][-1] == "row"


def test_the_command_takes_rows_as_a_level(capsys):
    assert main(["plan", "llama_60m", "--level", "row", "--rule", "foam"]) == 0
    assert ">  GWT level row" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "llama_60m", "--level", "rows"])
    assert "argument --level: 'rows' is neither an integer nor 'row'" in capsys.readouterr().err
    assert main(["plan", "llama_60m", "--level", "row", "--rule", "foam", "--mesh", "tp=2,fsdp=2"]) == 0
    assert re.search(r"optimizer  sums over rows +all-reduce +2 +1 ", capsys.readouterr().out)


def test_telemetry_of_rows_is_that_of_one_block():
    g = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    found = {}
    for rule in ("gwt", "foam"):
        p = nn.Parameter(torch.zeros(5, 30))
        optimizer = GWTAdamW([p], lr=0.1, level="row", rule=rule, telemetry=True)
        p.grad = g.clone()
        optimizer.step()
        found[rule] = optimizer.telemetry()["0.0"]
        details = (g - g.mean(-1, keepdim=True)).square().sum() / g.square().sum()
        assert found[rule]["detail_energy"] == pytest.approx(float(details), rel=1e-5)
        assert found[rule]["update_rms"] == pytest.approx(float(p.detach().square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"level": "rows"}, TypeError, "level must be an integer or 'row', got 'rows'"),
        ({"level": "row", "rule": "adamw"}, ValueError, "rule='adamw' transforms nothing"),
        ({"level": "row", "wavelet": "db2"}, ValueError, "level='row' folds .*knows no wavelet 'db2'"),
        ({"level": "row", "boundary": "reflect"}, ValueError, "level='row' folds .*knows no boundary 'reflect'"),
        ({"level": None}, TypeError, "level must be an integer or 'row', got None"),
    ],
)
def test_bad_levels_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        GWTAdamW(parameters(shapes=((4, 8),)), **options)


def test_functions_refuse_what_rows_have_not():
    p, g = torch.zeros(4, 8), torch.ones(4, 8)
    common = {"params": [p], "grads": [g], "steps": [1], "hypers": [Hyper()], "level": "row"}
    codes = [torch.zeros(4, 1, dtype=torch.int8)], [torch.zeros(4, 1, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="have no place in rows"):
        gwt_adamw_(exp_avgs=codes[0], exp_avg_sqs=codes[1], scales=[(torch.zeros(4), torch.zeros(4))], **common)
    with pytest.raises(TypeError, match="level must be an integer, got 'row'"):
        haar_dwt(p, "row")

"""A plan against the bytes that optimizers allocate, and against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from gwt_kernels import GWTAdafactor, GWTAdamMini, GWTAdamW, GWTMuon, gwt_param_groups
from gwt_kernels.models.files import presets
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.plan import Plan, measure_bandwidth, parse_bandwidth, plan, predicted_state_bytes
from tests.support.planned_models import FAMILIES, Small, config_file


def step_once(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, int]:
    """Take a step and return the bytes of state of each parameter, counted in its tensors."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    held = {p: [x for x in state.values() if isinstance(x, torch.Tensor)] for p, state in optimizer.state.items()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for xs in held.values() for x in xs}
    each = {p: sum(x.numel() * x.element_size() for x in xs) for p, xs in held.items()}
    assert sum(storages.values()) == sum(each.values())  # no view of a larger storage
    return each


def check_against_allocations(planned: Plan, model: nn.Module, **options: object) -> None:
    """Compare planned bytes with those of real optimizers over `model` after a step, parameter by parameter."""
    names = {p: name for name, p in model.named_parameters()}
    groups = gwt_param_groups(model, level=planned.chosen.level)
    held = step_once(GWTAdamW(groups, norm_growth_limit=options["limit"], state_dtype=options["moments"]))
    assert {entry.name: entry.state_bytes for entry in planned.entries} == {names[p]: n for p, n in held.items()}
    assert planned.state_bytes == sum(held.values())
    assert planned.chosen in planned.options
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert planned.adamw[0].state_bytes == sum(step_once(torch.optim.AdamW(trainable)).values())
    assert planned.gradient_bytes == sum(p.grad.nbytes for p in trainable)
    assert planned.weight_bytes == sum(p.nbytes for p in model.parameters())


def small_cases() -> list[object]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for level in range(4):
            for limit in (1.01, None):
                for moments in (None, torch.float32, torch.float64):
                    name = f"{dtype}-{level}-{'limiter' if limit else 'free'}-{moments}".replace("torch.", "")
                    cases.append(pytest.param(dtype, level, limit, moments, id=name))
    return cases


@pytest.mark.parametrize(("dtype", "level", "limit", "moments"), small_cases())
@pytest.mark.filterwarnings("ignore:gwt_param_groups found nothing")
def test_live_module_against_allocated_bytes(
    dtype: torch.dtype, level: int, limit: float | None, moments: torch.dtype | None
) -> None:
    model = Small().to(dtype)
    planned = plan(model, level=level, norm_growth_limit=limit, state_dtype=moments)
    check_against_allocations(planned, model, limit=limit, moments=moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_configuration_file_against_allocated_bytes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(kind, **FAMILIES[kind])
    family = transformers.AutoModel if kind == "t5" else transformers.AutoModelForCausalLM
    model = family.from_config(config).to(dtype)
    for level in range(4):
        planned = plan(config_file(tmp_path, kind), level=level, dtype=dtype)
        assert planned.model == type(model).__name__
        check_against_allocations(planned, model, limit=1.01, moments=None)
    assert any(entry.level for entry in planned.entries)
    assert any(len(entry.shape) == 3 and entry.level for entry in planned.entries) == (kind == "mixtral")


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float16], ids=str)
def test_moments_refused_by_the_optimizer_are_marked(moments: torch.dtype) -> None:
    planned = plan(Small(), level=2, state_dtype=moments, norm_growth_limit=None)
    full = plan(Small(), level=2, norm_growth_limit=None)
    scalars = 8 * len(full.entries)
    assert planned.state_bytes - scalars == (full.state_bytes - scalars) / 2
    if planned.chosen.offered:
        optimizer = GWTAdamW(gwt_param_groups(Small()), state_dtype=moments, norm_growth_limit=None)
        assert sum(step_once(optimizer).values()) == planned.state_bytes
        assert "computed only" not in str(planned)
    else:
        with pytest.raises(ValueError, match="state_dtype"):
            GWTAdamW(gwt_param_groups(Small()), state_dtype=moments)
        assert f"takes no {planned.chosen.moments} moments; their rows are computed only" in str(planned)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float16], ids=str)
def test_second_moments_of_rows_stay_wide_offered_or_not(moments: torch.dtype) -> None:
    planned = plan(Small(), level=2, rule="adam_mini", state_dtype=moments)
    of_rows = [state for name, (_, state) in planned.states.items() if planned.groups[name]["rule"] == "adam_mini"]
    assert {(state["exp_avg"].dtype, state["exp_avg_sq"].dtype) for state in of_rows} == {(moments, torch.float32)}


@pytest.mark.parametrize("head_rows", [1, 4, None])
def test_prediction_for_heads(head_rows: int | None) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 12), (2, 4, 5), (7,))]
    optimizer = GWTAdamMini(params, level=1, head_rows=head_rows)
    assert predicted_state_bytes(optimizer) == sum(step_once(optimizer).values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GWTAdamW, {"weight_rounding": "split"}),
        (GWTAdamW, {"wavelet": "db2"}),
        (GWTAdamMini, {"head_rows": None}),
        (GWTMuon, {"norm_growth_limit": None}),
        (GWTMuon, {"norm_growth_limit": "published", "workspace_bytes": 1 << 30, "adamw_eps": 1e-6}),
    ],
)
def test_options_are_those_of_the_optimizer(kind: type[PlannedOptimizer], options: dict[str, object]) -> None:
    model, rule = Small().to(torch.bfloat16), kind.rules[0]
    planned = plan(model, rule=rule, **options)
    taken = {key: value for key, value in options.items() if kind is not GWTMuon or key != "norm_growth_limit"}
    held = step_once(kind(gwt_param_groups(model, rule=rule), **taken))
    assert planned.state_bytes == sum(held.values())
    assert planned.chosen in planned.options


def test_dtypes_that_the_options_exclude_are_computed_only() -> None:
    planned = plan(Small(), wavelet="db2")
    assert {cost.moments for cost in planned.options if cost.level and not cost.offered} == {"bfloat16", "int8"}
    assert "With these options this optimizer takes no int8 moments" in str(planned)


@pytest.mark.parametrize("moments", [None, torch.bfloat16, torch.int8])
def test_adafactor_without_a_first_moment(moments: torch.dtype | None) -> None:
    planned = plan(Small(), rule="adafactor", beta1=None, state_dtype=moments)
    groups = gwt_param_groups(Small(), rule="adafactor")
    assert planned.state_bytes == sum(step_once(GWTAdafactor(groups, beta1=None, state_dtype=moments)).values())


def test_bytes_of_heads_and_of_split_weights_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False, dtype=torch.bfloat16))

    def moved(**options: object) -> int:
        return plan(model, level=1, include=["weight"], **options).chosen.moved_bytes

    # Weights twice, the gradient; two bytes more of each weight twice; half of 128 first moments, 16 second ones.
    one = 2 * 3 * 128
    assert moved(norm_growth_limit=None) == one + 2 * 4 * (64 + 64)
    assert moved(norm_growth_limit=None, weight_rounding="split") == one + 2 * 2 * 128 + 2 * 4 * (64 + 64)
    assert moved(rule="adam_mini") == one + 2 * 4 * (64 + 16)
    assert moved(rule="adam_mini", head_rows=8) == one + 2 * 128 + 2 * 4 * (64 + 2)


def test_prediction_for_an_optimizer() -> None:
    model = Small()
    for make in (
        lambda: GWTAdamW(gwt_param_groups(model, level=2), lr=0.01),
        lambda: GWTAdamW(gwt_param_groups(model, level=1), norm_growth_limit=None, state_dtype=torch.float64),
        lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], amsgrad=True),
    ):
        predicted = predicted_state_bytes(make())
        assert predicted == sum(step_once(make()).values())


def test_prediction_for_an_unknown_optimizer() -> None:
    with pytest.raises(TypeError, match="got SGD, whose state is unknown"):
        predicted_state_bytes(torch.optim.SGD(Small().parameters(), lr=0.1))


def test_adamw_at_level_0_is_planned() -> None:
    planned, same = plan(Small(), level=0, rule="adamw"), plan(Small(), level=0)
    assert planned.chosen == same.chosen
    assert planned.entries == same.entries


def test_small_model_worked_by_hand() -> None:
    model = Small()
    planned = plan(model, level=2)
    entries = {entry.name: entry for entry in planned.entries}
    assert list(entries) == [
        "embed.weight", "mlp.0.weight", "mlp.0.bias", "mlp.1.weight", "mlp.1.bias", "norm.weight", "norm.bias"
    ]  # fmt: skip
    assert "tied to lm_head.weight" in entries["embed.weight"].reason
    assert planned.frozen_bytes == 8 * 4 * 4
    assert planned.weight_bytes == 4 * (11 * 27 + 19 * 27 + 19 + 7 * 3 + 7 + 27 + 27 + 8 * 4)
    matrix = entries["mlp.0.weight"]  # 27 columns are 7 blocks of 4
    assert (matrix.level, matrix.weight_bytes, matrix.state_bytes) == (2, 4 * 19 * 27, 4 * (2 * 19 * 7 + 1) + 8)
    # 4 bytes per gradient, 8 per weight, 16 per pair of moments; then gradients and moments are read again
    assert matrix.moved_bytes == 12 * 19 * 27 + 16 * 19 * 7 + (4 * 19 * 27 + 8 * 19 * 7)
    assert entries["norm.bias"].moved_bytes == 27 * (12 + 16)
    assert entries["norm.bias"].state_bytes == 27 * 8 + 8
    assert sum(entry.moved_bytes for entry in planned.entries) == planned.chosen.moved_bytes
    assert sum(entry.state_bytes for entry in planned.entries) == planned.state_bytes


@pytest.mark.parametrize(
    ("level", "moments", "free", "limiter"),
    [  # docs/algorithm.md, "One pass": bytes per parameter with bf16 weights and gradients
        (0, torch.float32, 22, 0),
        (1, torch.float32, 14, 2 + 4),
        (2, torch.float32, 10, 2 + 2),
        (3, torch.float32, 8, 2 + 1),
        (2, torch.bfloat16, 8, 2 + 1),
    ],
)
def test_bytes_moved_per_parameter(level: int, moments: torch.dtype, free: float, limiter: float) -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(64, 32, bias=False)}).to(torch.bfloat16)
    planned = plan(model, level=level, state_dtype=moments)
    assert planned.chosen.moved_bytes == (free + limiter) * 64 * 32
    assert planned.chosen.limiter_bytes == limiter * 64 * 32
    unlimited = plan(model, level=level, state_dtype=moments, norm_growth_limit=None).chosen
    assert (unlimited.moved_bytes, unlimited.limiter_bytes) == (free * 64 * 32, 0)
    assert [cost.moved_bytes for cost in planned.adamw] == [14 * 64 * 32, 22 * 64 * 32]
    assert plan(model, dtype=torch.float32).adamw[0].moved_bytes == 28 * 64 * 32


def test_step_time_is_bytes_over_bandwidth() -> None:
    planned = plan(Small(), bandwidth=2e9)
    assert planned.seconds(planned.chosen) == planned.chosen.moved_bytes / 2e9
    assert plan(Small()).seconds(planned.chosen) is None
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="bandwidth"):
            plan(Small(), bandwidth=bad)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3.35e12", 3.35e12), ("3350GB/s", 3.35e12), (" 3.35 TB/s ", 3.35e12), ("500MB/s", 5e8), ("2e9", 2e9)],
)
def test_bandwidth_with_and_without_unit(text: str, value: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("text", ["3000", "fast", "3.3.5e12", "-3e12", "3GiB/s", "", "1e999", "nan"])
def test_implausible_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"bytes per second, such as 3\.35e12"):
        parse_bandwidth(text)


def test_measured_bandwidth_is_plausible() -> None:
    assert 1e7 < measure_bandwidth(torch.device("cpu"), size=2**24) < 1e14


def test_presets_are_the_published_sizes() -> None:
    sizes = ("60m", "130m", "350m", "1b", "7b", "13b", "70b", "405b")
    assert list(presets()) == [f"llama_{size}" for size in sizes]
    thirteen = 2 * 32000 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    assert plan("llama_13b", dtype=torch.bfloat16).weight_bytes == 2 * thirteen
    seventy = 2 * 32000 * 8192 + 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192
    assert plan("llama_70b", dtype=torch.bfloat16).weight_bytes == 2 * seventy
    layer = 2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248 + 2 * 16384
    largest = 2 * 128256 * 16384 + 126 * layer + 16384
    assert plan("llama_405b", dtype=torch.bfloat16).weight_bytes == 2 * largest


def test_dtype_defaults_to_the_files(tmp_path: Path) -> None:
    assert {e.dtype for e in plan(config_file(tmp_path, "llama")).entries} == {torch.bfloat16}
    saved = config_file(tmp_path, "llama", torch_dtype="float16")
    assert {e.dtype for e in plan(saved).entries} == {torch.float16}
    assert {e.dtype for e in plan(saved, dtype=torch.float32).entries} == {torch.float32}
    live = Small()
    assert {e.dtype for e in plan(live, dtype=torch.bfloat16).entries} == {torch.bfloat16}
    assert {p.dtype for p in live.parameters()} == {torch.float32}


def test_class_is_the_one_named_by_the_file(tmp_path: Path) -> None:
    assert plan(tmp_path if config_file(tmp_path, "t5") else "").model == "T5Model"
    path = config_file(tmp_path, "t5", architectures=["T5ForConditionalGeneration"])
    assert plan(path).model == "T5ForConditionalGeneration"
    path = config_file(tmp_path, "llama", architectures=["SomebodysModel"], auto_map={"AutoModel": "code.Model"})
    assert plan(path).model == "LlamaForCausalLM"
    path = config_file(tmp_path, "llama", quantization_config={"quant_method": "fp8"}, _attn_implementation="x")
    assert {e.dtype for e in plan(path).entries} == {torch.bfloat16}


def test_patterns_overrule_the_recipe() -> None:
    levels = {e.name: e.level for e in plan(Small(), include=[r"^embed"], exclude=[r"mlp\.0"]).entries}
    assert (levels["embed.weight"], levels["mlp.0.weight"], levels["mlp.1.weight"]) == (2, 0, 2)
    narrow = plan(Small(), include=[r"^mlp\.1"])  # three columns allow level 2 but not level 3
    assert sorted({cost.level for cost in narrow.options}) == [0, 1, 2]
    with pytest.raises(ValueError, match="too narrow for level 3"):
        plan(Small(), level=3, include=[r"^mlp\.1"])


def test_tensors_too_narrow_are_named() -> None:
    planned = plan(Small(), level=3)
    assert planned.too_narrow == ("mlp.1.weight",)
    assert "Too narrow for level 3, so at level 0: mlp.*.weight (1 tensors)" in str(planned)
    assert "Nothing is transformed" not in str(planned)
    assert plan(Small(), level=2).too_narrow == plan(Small(), level=0).too_narrow == ()


def test_model_without_anything_to_transform_says_so() -> None:
    planned = plan(nn.Linear(8, 4))
    assert "Nothing is transformed" in str(planned)
    assert len({cost.moved_bytes for cost in planned.options if cost.moments == "float32"}) == 1
    assert "Nothing is transformed" not in str(plan(nn.Linear(8, 4), level=0))


@pytest.mark.parametrize(
    ("argument", "error", "match"),
    [
        ({"model": 3}, TypeError, "got int"),
        ({"dtype": torch.int8}, TypeError, r"dtype must be.*int8"),
        ({"state_dtype": "bf16"}, TypeError, r"state_dtype must be.*'bf16'"),
        ({"level": -1}, ValueError, "level"),
        ({"norm_growth_limit": 0.5}, ValueError, "norm_growth_limit"),
        ({"rule": "muon", "norm_growth_limit": 1.5}, TypeError, "no option 'norm_growth_limit' of GWTMuon's"),
        ({"head_rows": 2}, TypeError, "no option 'head_rows' of GWTAdamW's: it takes lr, betas, eps"),
        ({"max_grad_norm": 1.0}, TypeError, "no option 'max_grad_norm'"),
        ({"backend": "triton"}, TypeError, "no option 'backend'"),
        ({"rule": ["gwt"]}, TypeError, r"rule must be a string.*\['gwt'\]"),
        ({"rule": "adamw", "level": 0, "norm_growth_limit": 1.5}, ValueError, "rule='adamw' has no limiter"),
        ({"wavelet": "db2", "state_dtype": torch.bfloat16}, ValueError, "knows no wavelet 'db2'"),
        ({"boundary": "periodic", "state_dtype": torch.int8}, ValueError, "boundary"),
        ({"rule": "adam_mini", "head_rows": 7}, ValueError, "head_rows"),
        ({"weight_rounding": "up"}, ValueError, "weight_rounding"),
        ({"model": nn.Linear(4, 4).requires_grad_(False)}, ValueError, "no trainable parameter"),
        ({"model": nn.Linear(4, 4, dtype=torch.complex64)}, TypeError, "complex64"),
    ],
)
def test_bad_arguments(argument: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan(**{"model": Small(), **argument})

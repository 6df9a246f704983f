"""GaLore and APOLLO in pre-training: the published recipe, common options, exact state bytes, exact resume."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from bench.common.models import build_model, load_config
from bench.pretrain import checkpoint, low_rank
from bench.pretrain.optimizers import build_optimizer
from bench.pretrain.training import Run
from tests.support.pretraining import (
    assert_predicted_state_bytes,
    assert_same_run,
    assert_scale_is_of_matrices,
    config_of,
    run_of,
    tiny_model,
    tiny_options,
    trained,
)

CPU = torch.device("cpu")


def need_package_of(name: str) -> None:
    if name == "galore":
        pytest.importorskip(
            "galore_torch",
            reason="needs galore_torch: `make test` installs it into build/peers and runs this file with it",
        )
    else:
        pytest.importorskip(
            "apollo_torch",
            reason="needs apollo_torch: its licence is CC BY-NC, so the user installs it: pip install apollo-torch",
        )


@pytest.fixture(params=low_rank.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    need_package_of(request.param)
    return str(request.param)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return tiny_options(tmp_path)


@pytest.mark.parametrize("name", low_rank.NAMES)
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "galore_torch" if name == "galore" else "apollo_torch"
    monkeypatch.setitem(sys.modules, module, None)
    model = build_model(load_config(str(tiny_model(tmp_path))), seed=0, device=CPU, dtype=torch.float32)
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs .*pip install {module[:6]}-torch bitsandbytes"):
        build_optimizer(name, model, lr=0.01, scale=0.25)


def test_only_low_rank_optimizers_have_a_projection_gap(options: list[str]) -> None:
    assert config_of(options, "adamw").projection_gap is config_of(options, "gwt2").projection_gap is None
    assert config_of(options, "galore").projection_gap == 200
    assert config_of(options, "apollo", "--projection-gap", "7").projection_gap == 7


def test_published_recipe(name: str, tmp_path: Path) -> None:
    model = build_model(load_config(str(tiny_model(tmp_path))), seed=0, device=CPU, dtype=torch.float32)
    optimizer = build_optimizer(name, model, lr=0.01, scale=0.25, projection_gap=5)
    assert type(optimizer).__module__.startswith("galore_torch" if name == "galore" else "apollo_torch")
    matrices = {id(p) for key, p in model.named_parameters() if "proj" in key}
    projected = [group for group in optimizer.param_groups if "rank" in group]
    assert {id(p) for group in projected for p in group["params"]} == matrices
    assert {(g["rank"], g["update_proj_gap"]) for g in projected} == {(1 if name == "apollo_mini" else 4, 5)}
    if name != "galore":
        assert {g["scale_type"] for g in projected} == {"tensor" if name == "apollo_mini" else "channel"}
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}
    assert build_optimizer(name, model, lr=0.01, scale=0.25).param_groups[0].get("update_proj_gap", 200) == 200


def test_scale_multiplies_only_the_matrices_update(name: str, options: list[str]) -> None:
    assert_scale_is_of_matrices(options, name, "--precision", "float32")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_predicted_state_bytes_are_exact(name: str, options: list[str], precision: str) -> None:
    assert_predicted_state_bytes(run_of(options, name, "--precision", precision))


def test_resume_is_exact(name: str, tmp_path: Path, options: list[str]) -> None:
    # New projections at steps 5 and 9, one of them after the resume; step 7 needs the old one.
    line = [*options, "--optimizer", name, "--projection-gap", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(line, whole)
    trained(line, parts, stop_at=6)
    trained(line, parts, resume=True)
    end, expected = checkpoint.read(parts / "checkpoint.pt"), checkpoint.read(whole / "checkpoint.pt")
    assert_same_run(end, expected)

    fresh = tmp_path / "fresh"
    trained([*options, "--optimizer", name, "--projection-gap", "5"], fresh)
    with pytest.raises(AssertionError):
        assert_same_run(checkpoint.read(fresh / "checkpoint.pt")["model"], expected["model"])


def test_a_nonfinite_gradient_counts_as_divergence(options: list[str]) -> None:
    need_package_of("galore")
    run: Run = run_of(options, "galore")
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"galore: linalg.svd.* at step 1; lower --lr"):
        run.train_step()

"""Peers of the optimizer benchmark: a missing package becomes a row, an installed one is checked and timed."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from bench.common.measure import held_bytes
from bench.common.models import Shape
from bench.optimizers import timing
from bench.optimizers.candidate import Candidate, Likeness, build, bytes_moved
from bench.optimizers.checks import check
from bench.optimizers.peers import ADAMW, EIGHT_BIT, PEERS, projection_time, suite
from tests.support.candidates import BANDWIDTH

CPU = torch.device("cpu")
PACKAGES = {
    "ptwt": "ptwt",
    "bitsandbytes": "bitsandbytes",
    "flashoptim": "flashoptim",
    "optimi": "optimi",
    "torchao": "torchao",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "deepspeed": "deepspeed",
}
SHAPES = [
    Shape("square", (64, 64), True, True),
    Shape("tall", (171, 64), True, True),
    Shape("wide", (64, 171), True, True),
    Shape("embedding", (128, 64), False, True),
    Shape("norm", (64,), False, False),
]


def peers(name: str, dtype: torch.dtype = torch.float32) -> list[Candidate]:
    return PEERS[name](dtype, [2])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_becomes_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__
    for module in [*sys.modules]:
        if module.split(".")[0] == PACKAGES[name] or module == "bench.optimizers.ptwt_step":
            monkeypatch.delitem(sys.modules, module)

    def absent(module: str, *args: Any, **options: Any) -> Any:
        if module.split(".")[0] == PACKAGES[name]:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return original(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    results = timing.measure("tiny", peers(name), SHAPES, CPU, repetitions=1, bandwidth=BANDWIDTH)
    assert results
    for result in results:
        assert result.note.startswith(f"cannot run here: ModuleNotFoundError: No module named '{PACKAGES[name]}")
        assert not result.failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(PACKAGES[name]) is None,
                reason="needs this peer on the path: `make test` installs the peers into build/peers and runs this "
                "file with them; apollo_torch is the user's to install, for its licence (CC BY-NC)",
            ),
        )
        for name in sorted(set(PACKAGES) - {"ptwt", "torchao"})
    ],
)
def test_an_installed_package_is_checked_and_timed(name: str, dtype: torch.dtype) -> None:
    results = timing.measure("tiny", peers(name, dtype), SHAPES, CPU, repetitions=1, bandwidth=BANDWIDTH)
    for result in results:
        assert bool(result.metrics) != bool(result.note)
        assert not result.note or result.note.startswith("cannot run here: "), result.note
    if name != "flashoptim" or dtype == torch.float32:  # FlashOptim has no other setting for a CPU
        assert any(result.metrics for result in results)


def test_names_of_candidates_are_distinct() -> None:
    for device in ("cpu", "cuda"):
        candidates = suite(PEERS, [0, 1, 2, 3], torch.device(device))
        keys = [(candidate.name, candidate.dtype) for candidate in candidates]
        assert len(set(keys)) == len(keys)
        assert {candidate.peer for candidate in candidates} == set(PEERS)
        assert all((c.oracle is None) != (c.likeness is None) for c in candidates)
    assert [(candidate.name, candidate.weights) for candidate in suite(["torch"], [2], CPU)] == [
        *((f"AdamW({how})", "float32") for how in ("fused=True", "foreach=True", "foreach=False")),
        *(("AdamW(fused=True)", dtype) for dtype in ("bfloat16", "float16")),
    ]


def test_foam_with_bfloat16_moments_is_timed_on_a_cpu_beside_equal_weights() -> None:
    """Check this for both rules' bfloat16 moments, with weights rounded to nearest, as AdamW's."""
    found = {(candidate.name, candidate.weights) for candidate in suite(["gwt", "torch"], [2], CPU)}
    for weights in ("float32", "bfloat16"):
        moments = {f"GWTAdamW level 2, {rule}bfloat16 moments" for rule in ("", "foam, ")}
        assert {(name, weights) for name in moments | {"AdamW(fused=True)"}} <= found


def test_other_rules_are_timed_beside_the_fused_adamw() -> None:
    def names(*packages: str) -> list[str]:
        return [candidate.name for candidate in suite(packages, [2], CPU) if candidate.weights == "float32"]

    assert names("rules").count("AdamW(fused=True)") == 1
    assert names("torch", "rules").count("AdamW(fused=True)") == 1
    assert {candidate.peer for candidate in suite(["rules"], [2], CPU)} == {"rules"}
    assert "GWTMuon level 0, int8 moments" in names("rules")


def like(build: Callable[[list[dict]], Optimizer], likeness: Likeness = ADAMW) -> Candidate:
    return Candidate("other AdamW", torch.float32, None, False, build, None, "other", likeness)


def verdict(candidate: Candidate) -> float:
    return check(build(candidate, SHAPES, CPU))


class SkipsTheLast(AdamW):
    def step(self, closure: None = None) -> None:
        last = self.param_groups[-1]["params"][-1]
        kept, last.grad = last.grad, None
        super().step()
        last.grad = kept


class OverwritesGradients(AdamW):
    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.zero_()


class NotANumber(AdamW):
    def step(self, closure: None = None) -> None:
        super().step()
        self.param_groups[0]["params"][0].data[0] = float("nan")


def test_an_update_like_adamw_passes() -> None:
    assert verdict(like(lambda groups: AdamW(groups))) <= 1
    assert verdict(like(lambda groups: OverwritesGradients(groups))) <= 1


@pytest.mark.parametrize(
    "broken",
    [
        lambda groups: SGD(groups),
        lambda groups: AdamW(groups, maximize=True),
        lambda groups: AdamW(groups, betas=(0.5, 0.999)),
        lambda groups: AdamW(groups, betas=(0.9, 0.1)),
        SkipsTheLast,
        NotANumber,
    ],
    ids=["sgd", "ascent", "momentum", "second moment", "a tensor left out", "nan"],
)
@pytest.mark.parametrize("likeness", [ADAMW, EIGHT_BIT], ids=["exact", "8 bits"])
def test_an_update_unlike_adamw_fails(broken: Callable[[list[dict]], Optimizer], likeness: Likeness) -> None:
    (result,) = timing.measure("tiny", [like(broken, likeness)], SHAPES, CPU, repetitions=1, bandwidth=BANDWIDTH)
    assert not result.metrics
    assert result.note.startswith("not timed: differs from AdamW's update by ")
    assert not result.failed  # only this package's failures count


class Projector:
    """A stand-in for GaLore's projector, renewed if the step is a multiple of the gap."""

    def __init__(self) -> None:
        self.ortho_matrix, self.renewals = torch.ones(10, 3), 0

    def project(self, gradient: torch.Tensor, step: int) -> None:
        if step % 200 == 0:
            self.renewals += 1
            torch.linalg.svd(torch.randn(300, 300))


def test_projections_are_read_only_state_with_a_timed_renewal() -> None:
    built = build(like(lambda groups: AdamW(groups)), [*SHAPES, SHAPES[0]], CPU)
    assert projection_time(built, CPU) is None
    moved, held = bytes_moved(built), held_bytes(built.optimizer.state)
    first, twin = built.tensors[0], built.tensors[-1]
    projectors = [Projector(), Projector()]
    for p, projector in zip((first, twin), projectors, strict=True):
        built.optimizer.state[p]["projector"] = projector
    once = projection_time(built, CPU)
    assert once is not None
    assert once > 0
    assert [projector.renewals for projector in projectors] == [2, 0]  # both have one shape
    assert bytes_moved(built) - moved == 2 * 30 * 4
    assert held_bytes(built.optimizer.state) - held == 2 * 30 * 4

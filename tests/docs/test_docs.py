"""The site agrees with the code: pages are in its menu, messages are real, signatures are current."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gwt_kernels
from bench.common import records
from bench.pretrain.optimizers import check_name
from gwt_kernels import (
    GWTAdafactor,
    GWTAdamMini,
    GWTAdamW,
    GWTLion,
    GWTMuon,
    gwt_param_groups,
    haar_dwt,
    haar_idwt,
    migrate,
    release_gradients,
)
from gwt_kernels.backends import choice
from gwt_kernels.backends.cpu import build
from gwt_kernels.backends.torch import literal
from gwt_kernels.plan import plan
from gwt_kernels.plan_sharded import plan_sharded

ROOT = Path(__file__).parents[2]
SHOWN = [
    GWTAdamW,
    GWTMuon,
    GWTLion,
    GWTAdamMini,
    GWTAdafactor,
    gwt_param_groups,
    haar_dwt,
    haar_idwt,
    migrate,
    release_gradients,
    plan,
    plan_sharded,
]
INTERFACE = (ROOT / "docs" / "interface.md").read_text()


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"^    - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_reference_has_all_that_is_public() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    names = [name for name in gwt_kernels.__all__ if callable(getattr(gwt_kernels, name))]
    assert [name for name in names if f"::: gwt_kernels.{name}\n" not in page] == []


def test_every_option_is_explained() -> None:
    section = re.search(r"## `GWTAdamW`\n(.*?)\n\*\*State\*\*", INTERFACE, re.DOTALL)
    assert section is not None
    listed = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    assert sorted(listed) == sorted(set(inspect.signature(GWTAdamW).parameters) - {"params"})


def test_every_option_of_muons_own_is_explained() -> None:
    section = re.search(r"## `GWTMuon`\n(.*?)\nState:", INTERFACE, re.DOTALL)
    assert section is not None
    listed = {name for row in re.findall(r"^\| (`.*?`) \|", section[1], re.M) for name in re.findall(r"\w+", row)}
    shared = set(inspect.signature(GWTAdamW).parameters) - {"lr", "weight_decay", "eps", "level", "scale"}
    assert listed == set(inspect.signature(GWTMuon).parameters) - shared


@pytest.mark.parametrize("function", SHOWN)
def test_signatures_are_current(function: Callable[..., object]) -> None:
    shown = re.search(rf"^{function.__name__}\(([^()]*(?:\([^()]*\)[^()]*)*)\)", INTERFACE, re.MULTILINE)
    assert shown is not None
    names: dict[str, Any] = {"torch": torch}
    exec(f"def page({shown[1]}): ...", names)

    def plain(call: Callable[..., object]) -> list[tuple[object, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(call).parameters.values()]

    assert plain(names["page"]) == plain(function)


# The messages of the troubleshooting page, each one provoked.


def optimizer(**options: Any) -> GWTAdamW:
    return GWTAdamW([nn.Parameter(torch.ones(4, 8))], **options)


def on_triton(x: torch.Tensor, level: int = 1) -> None:
    haar_dwt(x, level, backend="triton")


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    on_triton(torch.ones(8))


def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_triton(torch.ones(8))


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    choice.resolve("compiled", torch.device("cpu"), torch.float32, 2)


def interpreted_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    raise RuntimeError(choice.triton_obstacle(torch.device("cuda"), torch.float32))


def interpreted_codegen(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TRITON_INTERPRET": "1", "PATH": ""}
    command = [sys.executable, "-m", "bench.codegen"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    raise RuntimeError(done.stderr.strip().removeprefix("bench.codegen: "))


def nothing_to_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="nothing to transform") as caught:
        gwt_param_groups(nn.Embedding(4, 4))
    raise UserWarning(str(caught[0].message))


def without_pywavelets(monkeypatch: pytest.MonkeyPatch) -> None:
    literal.filter_bank.cache_clear()
    monkeypatch.setitem(sys.modules, "pywt", None)
    optimizer(wavelet="db2")


def two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    two = GWTAdamW([nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))])
    optimizer().load_state_dict(two.state_dict())


def of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer().load_state_dict(torch.optim.AdamW([nn.Parameter(torch.ones(4, 8))]).state_dict())


def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(4, 8, sparse=True)
    sparse_optimizer = GWTAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    sparse_optimizer.step()


def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer().step()


def foreign_record(tmp_path: Path) -> Callable[[pytest.MonkeyPatch], object]:
    path = tmp_path / "results.json"
    path.write_text('{"format": "something else"}')
    return lambda _: records.read(path)


PROVOKED: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "Triton is not installed": without_triton,
    "the tensors are on cpu": on_a_cpu,
    "cannot follow pointers": interpreted_on_cuda,
    "compiles none": interpreted_codegen,
    "its arithmetic is float32": lambda _: on_triton(torch.ones(8, dtype=torch.float64)),
    "needs a C compiler": without_compiler,
    "is too deep": lambda _: optimizer(level=5),
    "found nothing to transform": nothing_to_transform,
    "matches no parameter": lambda _: gwt_param_groups(nn.Linear(8, 8), include=["nowhere"]),
    "takes its filters from PyWavelets": without_pywavelets,
    "has level=2, the optimizer level=3": lambda _: optimizer(level=3).load_state_dict(optimizer().state_dict()),
    "has groups of": two_groups,
    "was not saved by this package": of_torch,
    "sparse gradients": sparse,
    "is being captured": captured,
    "would have to wait": lambda _: optimizer(lr=torch.ones((), device="meta")),
    "has the format": lambda _: None,
    "unknown optimizer": lambda _: check_name("sgd"),
}


ERRORS = (ModuleNotFoundError, RuntimeError, TypeError, UserWarning, ValueError)


@pytest.mark.parametrize("part", PROVOKED)
def test_messages_are_real(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"```text\n(.*)\n```", page)
    assert len(messages) == len(PROVOKED)  # every message is provoked
    (message,) = (text for text in messages if part in text)
    provoke = foreign_record(tmp_path) if part == "has the format" else PROVOKED[part]
    remembered = (choice.triton_obstacle, choice.compiler_obstacle)
    for obstacle in remembered:
        obstacle.cache_clear()
    try:
        with pytest.raises(ERRORS) as caught:
            provoke(monkeypatch)
    finally:
        for obstacle in remembered:
            obstacle.cache_clear()
    assert re.fullmatch(".*".join(map(re.escape, message.split("…"))), str(caught.value), re.DOTALL)

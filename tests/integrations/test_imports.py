"""The package needs only torch, and an integration without its library names it and how to install it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("accelerate", "lightning", "pytorch_lightning", "tensorboard", "transformers")


def test_the_package_imports_no_integrated_library_and_keeps_plan_a_module() -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL)
    code = (
        f"import sys; {blocked}; import gwt_kernels, gwt_kernels.integrations, gwt_kernels.plan;"
        "import gwt_kernels.__main__; from gwt_kernels.plan import plan;"
        "assert callable(plan) and gwt_kernels.plan.plan is plan;"
        "print(gwt_kernels.GWTAdamW)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "GWTAdamW" in done.stdout


@pytest.mark.parametrize(
    ("integration", "absent", "message"),
    [
        ("transformers", ["transformers"], "needs transformers: pip install transformers accelerate"),
        ("transformers", ["accelerate"], "needs accelerate: pip install transformers accelerate"),
        ("lightning", ["lightning", "pytorch_lightning"], "needs lightning: pip install lightning"),
    ],
)
def test_a_missing_library_is_named(
    integration: str, absent: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate, to do without: pip install accelerate")
    monkeypatch.delitem(sys.modules, f"gwt_kernels.integrations.{integration}", raising=False)
    for library in absent:
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, f"{library}.pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=message) as caught:
        importlib.import_module(f"gwt_kernels.integrations.{integration}")
    assert caught.value.name == absent[0]

"""Options of pytest that run compiled Triton kernels without a GPU: ``pytest --compiled sm_90``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.ptx.driver import Driver

CACHE = Path(__file__).parents[2] / "build" / "triton"
"""Triton's cache of compiled kernels, kept for later runs, since compiling takes longer than running."""
_CHIP = "GWT_KERNELS_COMPILED"  # environment variable: the chip for processes that tests start
CHIPS = ("sm_80", "sm_90", "sm_100")
_driver: Driver | None = None


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("compiled", "Triton's kernels without a GPU")
    group.addoption(
        "--compiled",
        choices=CHIPS,
        help="compile Triton's kernels for a GPU and run their PTX on the CPU, in place of Triton's interpreter; "
        "where there is a CUDA device, it runs them",
    )
    group.addoption(
        "--disturb",
        type=int,
        metavar="SEED",
        help="with --compiled: errors of approximate instructions, within what is documented",
    )


def configure(config: pytest.Config) -> bool:
    """Choose how Triton's kernels run, by the command line, and return whether their PTX is interpreted.

    A CUDA device runs them itself: tensors are then in its memory, where no interpreter of PTX reads.
    """
    chip, disturb = config.getoption("--compiled"), config.getoption("--disturb")
    os.environ.pop(_CHIP, None)
    if chip is None and disturb is not None:
        raise pytest.UsageError("--disturb needs --compiled: Triton's interpreter approximates nothing")
    if disturb is not None and torch.cuda.is_available():
        raise pytest.UsageError("--disturb needs kernels on the CPU: set CUDA_VISIBLE_DEVICES=''")
    if chip is None or torch.cuda.is_available():
        return False
    os.environ[_CHIP] = chip
    _start(chip, disturb)
    return True


def begin() -> None:
    """Run Triton's kernels in a process that a test has started as the test's own process runs them.

    Call it before kernels are imported, since Triton reads the environment then.
    """
    if chip := os.environ.get(_CHIP):
        _start(chip, None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def _start(chip: str, disturb: int | None) -> None:
    """Make the interpreter of PTX the device that Triton launches on."""
    global _driver
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    from tests.ptx.driver import Driver, Options  # imports Triton, which reads the variables

    _settle_keys()
    _driver = Driver(chip, Options(disturb=disturb)).__enter__()


def _settle_keys() -> None:
    """Make a kernel's key in Triton's cache independent of the kernels launched before it.

    By default, Triton puts the constants of a function that the kernel calls into the key only if it knows them,
    for example because another kernel has called the function before.
    """
    from triton.runtime.jit import DependenciesFinder

    update = DependenciesFinder._update_hash

    def update_settled(self: Any, function: Any) -> None:
        function.cache_key  # noqa: B018  reading it finds the constants
        update(self, function)

    DependenciesFinder._update_hash = update_settled


def driver() -> Driver | None:
    """Return the driver that runs compiled kernels; None if Triton interprets them, or a GPU runs them."""
    return _driver


def report(terminal: pytest.TerminalReporter) -> None:
    if _driver is not None and _driver.counts.launches:
        counts = _driver.counts
        forms = {form for program in counts.programs for form in program.forms}
        each = ", ".join(f"{n} of {name}" for name, n in sorted(counts.launches.items()))
        terminal.write_line(
            f"compiled for {_driver.chip}: {len(counts.programs)} kernels of {len(forms)} forms of instructions; "
            f"launches: {each}"
        )

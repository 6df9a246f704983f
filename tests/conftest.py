"""Configuration of the test run: the device of Triton's kernels, and visible skips of GPU tests."""

import gc
import os
from collections.abc import Generator

import pytest
import torch

from tests.ptx import plugin
from tests.support import interpreter

torch.set_num_threads(1)  # the tests run in several processes


def pytest_addoption(parser: pytest.Parser) -> None:
    plugin.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Choose between Triton's interpreter and compiled kernels, before a test module imports Triton."""
    if not plugin.configure(config) and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection while tests are collected, of which nearly all stay: a quarter of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Exclude imported modules and collected tests from garbage collection, which takes 0.2 s with them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Collect garbage once, for what ends with an error; pytest does it five times afterwards."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    interpreter.quicken()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    plugin.report(terminalreporter)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device of Triton's kernels: the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(
            reason="needs a CUDA device: run `python -m pytest -m gpu` on a machine that has one"
        )
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)

"""Set-up of the test run: Triton's interpreter where there is no CUDA device, and no silent skips of GPU tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no test module does before this

torch.set_num_threads(1)  # the tests run in several processes


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run: the CUDA device where there is one, the interpreter's CPU elsewhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(
            reason="needs a CUDA device: run `python -m pytest -m gpu` on a machine that has one"
        )
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)

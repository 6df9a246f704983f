"""The command line: ``gwt-kernels`` and ``python -m gwt_kernels``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 for success, 1 for a failed check, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="gwt-kernels", description="Fused GWT-Adam optimizers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="versions, devices, backends and a self-check, for bug reports",
        description="Print versions, devices and which backend each gets, then check the fused step against the "
        "literal algorithm. Without a CUDA device the Triton kernels are checked through Triton's interpreter.",
    )
    parser.parse_args(arguments)
    return _doctor()


def _doctor() -> int:
    import torch

    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, and for this process alone
    from gwt_kernels import doctor

    return 0 if doctor.report() else 1


if __name__ == "__main__":
    sys.exit(main())

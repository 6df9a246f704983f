"""The command line: ``gwt-kernels`` and ``python -m gwt_kernels``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
}


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
    _add_plan(commands)
    options = parser.parse_args(arguments)
    return _plan(options) if options.command == "plan" else _doctor()


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a model will cost: states, bytes moved per step, time per step",
        description="Say what each parameter of a model gets and why, what every level and dtype of the moments "
        "keeps next to AdamW, and how long a step takes that does nothing but move its bytes. The model is built "
        "without memory, from its configuration alone.",
    )
    add = parser.add_argument
    add("model", help="a Hugging Face config.json, a folder with one, or a preset: llama_60m, 130m ... llama_70b")
    add("--level", type=int, default=2, help="levels of the transform (default: 2)")
    add("--dtype", choices=DTYPES, metavar="DTYPE", help="of weights and gradients: bf16, fp16, fp32 or fp64 "
        "(default: the configuration's, or bf16)")  # fmt: skip
    add(
        "--state-dtype",
        choices=[*DTYPES, "int8"],
        metavar="DTYPE",
        help="of the moments, int8 too (default: the optimizer's)",
    )
    add("--rule", choices=("gwt", "foam"), default="gwt", help="as for GWTAdamW (default: gwt)")
    add("--no-limiter", action="store_true", help="plan for norm_growth_limit=None")
    add("--include", action="append", metavar="RE", help="transform matrices of this name too; may be repeated")
    add(
        "--exclude", action="append", metavar="RE", help="leave parameters of this name at level 0; may be repeated"
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--bandwidth",
        metavar="B/s",
        help="of memory: bytes per second (3.35e12), or with a unit: 3350GB/s, 3.35TB/s",
    )
    speed.add_argument("--measure", action="store_true", help="measure the bandwidth of a copy on this machine")
    add("--json", action="store_true", help="print everything as JSON instead of tables")
    add("--verbose", action="store_true", help="a row for every parameter, not one for all layers")


def _plan(options: argparse.Namespace) -> int:
    import torch

    from gwt_kernels.plan import measure_bandwidth, parse_bandwidth, plan
    from gwt_kernels.plan_text import render

    def dtype(name: str | None) -> torch.dtype | None:
        return None if name is None else getattr(torch, DTYPES.get(name, name))

    try:
        bandwidth = parse_bandwidth(options.bandwidth) if options.bandwidth else None
        planned = plan(
            options.model,
            level=options.level,
            state_dtype=dtype(options.state_dtype),
            rule=options.rule,
            norm_growth_limit=None if options.no_limiter else "published",
            include=options.include,
            exclude=options.exclude,
            dtype=dtype(options.dtype),
            bandwidth=measure_bandwidth() if options.measure else bandwidth,
        )
        if planned.too_narrow and not any(entry.level for entry in planned.entries):
            names = ", ".join(planned.too_narrow[:3]) + (" and so on" if len(planned.too_narrow) > 3 else "")
            raise ValueError(
                f"level {options.level} is too deep for all {len(planned.too_narrow)} matrices of the recipe, so "
                f"that nothing would be transformed: {names} would stay at level 0; use a lower level"
            )
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"gwt-kernels plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(planned.as_dict(), indent=1) if options.json else render(planned, verbose=options.verbose))
    return 0


def _doctor() -> int:
    import torch

    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, and for this process alone
    from gwt_kernels import doctor

    return 0 if doctor.report() else 1


if __name__ == "__main__":
    sys.exit(main())

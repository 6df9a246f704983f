"""The command line: ``gwt-kernels`` and ``python -m gwt_kernels``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gwt_kernels import __version__
from gwt_kernels.core.level import ROW, Level
from gwt_kernels.formats.moments import FORMATS
from gwt_kernels.rules import RULES

if TYPE_CHECKING:
    import torch

    from gwt_kernels.plan import Plan
    from gwt_kernels.plan_sharded import ShardedPlan

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
}


def level_of(text: str) -> Level:
    """Parse a level: an integer, or ``row``."""
    try:
        return ROW if text == ROW else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor 'row'") from None


def head_rows_of(text: str) -> int | None:
    """Parse ``head_rows``: an integer, or ``all`` for None."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor 'all'") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Returns:
        0 for success, 1 for a failed check or output that cannot be written, 2 for bad arguments, and 141 (128 +
        SIGPIPE, as shells report it) if the reader of the output has closed the pipe.
    """
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error can be caught; argparse flushes its help only at exit
    except BrokenPipeError:
        _drop_output()
        return 128 + 13  # SIGPIPE
    except OSError as error:  # the disk is full
        _drop_output()
        print(f"gwt-kernels: the output cannot be written: {error}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """Redirect standard output to the null device, for the flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="gwt-kernels", description="Fused GWT-Adam optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"gwt-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="versions, devices, backends and a self-check, for bug reports",
        description="Print versions, devices and which backend each gets, then check the fused step against the "
        "literal algorithm. Without a CUDA device the Triton kernels are checked through Triton's interpreter, if "
        "numpy is there.",
    )
    _add_plan(commands)
    _add_migrate(commands)
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor()
    return _plan(options) if options.command == "plan" else _migrate(options)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a model will cost: states, bytes moved per step, time per step",
        description="Print each parameter's level and the reason for it, the state of every level and dtype of "
        "moments beside AdamW's, and the time in which memory moves the bytes of a step. The model is built "
        "without memory, from its configuration alone.",
    )
    add = parser.add_argument
    add("model", help="a Hugging Face config.json, a folder with one, or a preset: llama_60m, llama_130m, "
        "llama_350m, llama_1b, llama_7b, llama_13b, llama_70b or llama_405b")  # fmt: skip
    _add_options(parser)
    add(
        "--head-rows",
        type=head_rows_of,
        default=1,
        metavar="N",
        help="rows that share a second moment, for --rule adam_mini (default: 1), or all: all of a tensor",
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--bandwidth",
        metavar="B/s",
        help="of memory: bytes per second (3.35e12), or with a unit: 3350GB/s, 3.35TB/s",
    )
    speed.add_argument("--measure", action="store_true", help="measure this machine's bandwidth")
    many = parser.add_argument_group(
        "several processes",
        "bytes of each process, collectives, and their predicted times on links of this bandwidth and latency",
    )
    many.add_argument("--world-size", type=int, metavar="N", help="processes; without --mesh all shard by FSDP2")
    many.add_argument("--mesh", metavar="AXES", help="replicas, FSDP2, tensor parallelism: dp=2,fsdp=4,tp=8")
    many.add_argument("--clip", action="store_true", help="the step clips gradients: max_grad_norm")
    many.add_argument("--link-bandwidth", metavar="B/s", help="of a process to others (assumed: 50GB/s)")
    many.add_argument("--latency", metavar="S", help="of a message: 1e-5 or 10us (assumed: 10us)")
    many.add_argument("--host-time", metavar="S", help="of the host, for each tensor: 5e-6 or 5us (assumed: 5us)")
    many.add_argument(
        "--matrix-flops", type=float, metavar="F/s", help="of Newton-Schulz, for --rule muon (assumed: 400e12)"
    )
    add("--json", action="store_true", help="print everything as JSON instead of tables")
    add("--verbose", action="store_true", help="a row for every parameter, not one for all layers")


def _add_migrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "migrate",
        help="a checkpoint of AdamW, Muon, Adafactor or of other options, as one that an optimizer here loads",
        description="Copy a checkpoint file with the optimizer's state made into that of GWTAdamW, or of the "
        "optimizer of --rule, over the groups of gwt_param_groups, and say what of that is exact and what "
        "approximate. Options are the checkpoint's unless given, where it is of an optimizer of the same kind. "
        "Nothing in the file is executed but what --allow names.",
    )
    add = parser.add_argument
    add("checkpoint", help="what torch.save wrote: the optimizer's state, or a dict that holds it")
    add(
        "--config",
        required=True,
        metavar="MODEL",
        help="a Hugging Face config.json, a folder with one, or a preset (gwt-kernels plan --help)",
    )
    add("--out", required=True, metavar="FILE", help="to write; must not exist")
    _add_options(parser)
    for number in ("--lr", "--eps", "--weight-decay", "--momentum"):
        add(number, type=float, metavar="X", help="default: the checkpoint's")
    add("--adamw-lr", type=float, metavar="X", help="of what GWTMuon, GWTLion and GWTAdafactor leave to AdamW "
        "(default: that of the checkpoint's AdamW)")  # fmt: skip
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help="default: the checkpoint's")
    add("--scale", type=float, metavar="X", help="default: the checkpoint's, or the optimizer's")
    add("--wavelet", metavar="NAME", help="default: the checkpoint's, or haar")
    add(
        "--boundary",
        choices=("zero", "constant", "symmetric", "reflect", "periodic"),
        help="default: the checkpoint's, or zero",
    )
    add("--correct-bias", action=argparse.BooleanOptionalAction, help="default: the checkpoint's, or yes")
    add("--names", metavar="FILE", help="the parameters' names, one a line, in the order of a state without names")
    add("--prefix", metavar="NAME", help="attribute in which the module that the optimizer is over has the model, "
        "such as model in a LightningModule with self.model; parameters' names begin with it")  # fmt: skip
    add("--rename", action="append", metavar="OLD=NEW", help="what an entry of a parameter's state is called here, "
        "such as norm=limiter_norm; nothing after the = leaves it behind")  # fmt: skip
    add("--key", action="append", help="where in the file the state is, if in several places; repeat it for "
        "several optimizers, such as a Muon and an AdamW, that become one")  # fmt: skip
    add("--allow", action="append", metavar="CLASS", help="module.Class that the file may hold beside tensors and "
        "plain data; imported and executed, so trust the file; may be repeated")  # fmt: skip


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that build an optimizer."""
    add = parser.add_argument
    others = [name for name in FORMATS if name not in DTYPES]
    add("--level", type=level_of, default=2, help="levels of the transform (default: 2), or row: one block a row")
    add("--dtype", choices=DTYPES, metavar="DTYPE", help="of weights and gradients: bf16, fp16, fp32 or fp64 "
        "(default: the configuration's, or bf16)")  # fmt: skip
    add(
        "--state-dtype",
        choices=[*DTYPES, *others],
        metavar="DTYPE",
        help=f"of the moments: as --dtype, or {', '.join(others)} (default: the optimizer's)",
    )
    add("--rule", choices=tuple(RULES), default="gwt", help="as for GWTAdamW, or muon for GWTMuon and so on "
        "(default: gwt)")  # fmt: skip
    add("--no-limiter", action="store_true", help="norm_growth_limit=None")
    add("--weight-rounding", choices=("nearest", "stochastic", "split"), help="as for GWTAdamW")
    add("--include", action="append", metavar="RE", help="transform matrices of this name too; may be repeated")
    add(
        "--exclude", action="append", metavar="RE", help="leave parameters of this name at level 0; may be repeated"
    )


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, DTYPES.get(name, name))


def _migrate(options: argparse.Namespace) -> int:
    from gwt_kernels.migration.carried import Recipe
    from gwt_kernels.migration.checkpoints import Reading, migrate_file

    out, checkpoint = Path(options.out), Path(options.checkpoint)
    try:
        written = migrate_file(
            checkpoint,
            out,
            options.config,
            dtype=_dtype(options.dtype),
            recipe=Recipe(options.level, options.include, options.exclude),
            reading=Reading(
                None if options.names is None else _names_in(Path(options.names)),
                _renamed(options.rename or ()),
                options.key or (),
                options.allow or (),
                options.prefix,
            ),
            rule=options.rule,
            norm_growth_limit=None if options.no_limiter else "published",
            state_dtype=_dtype(options.state_dtype),
            weight_rounding=options.weight_rounding,
            lr=options.lr,
            betas=options.betas and tuple(options.betas),
            eps=options.eps,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            adamw_lr=options.adamw_lr,
            scale=options.scale,
            wavelet=options.wavelet,
            boundary=options.boundary,
            correct_bias=options.correct_bias,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        return _refuse("migrate", error)
    print(written.migration)
    if written.notes:
        print(*written.notes, sep="\n")
    print(f"{out}: {out.stat().st_size:,} bytes; {checkpoint}: {checkpoint.stat().st_size:,} bytes, unchanged")
    return 0


def _refuse(command: str, error: Exception) -> int:
    """Print an error with control characters escaped, since a file may supply them, and return the exit status."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(error))
    print(f"gwt-kernels {command}: {text}", file=sys.stderr)
    return 2


def _names_in(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"--names {path} is no text ({error}): give a file with a name per line") from error


def _renamed(pairs: Sequence[str]) -> dict[str, str | None]:
    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (old, equals, _) in zip(pairs, split, strict=True) if not (old and equals)]:
        raise ValueError(f"--rename {wrong[0]!r} is not OLD=NEW, such as norm=limiter_norm")
    return {old: new or None for old, _, new in split}


def _plan(options: argparse.Namespace) -> int:
    from gwt_kernels.plan import measure_bandwidth, parse_bandwidth, plan

    try:
        bandwidth = None if options.bandwidth is None else parse_bandwidth(options.bandwidth)
        planned = plan(
            options.model,
            level=options.level,
            state_dtype=_dtype(options.state_dtype),
            rule=options.rule,
            include=options.include,
            exclude=options.exclude,
            dtype=_dtype(options.dtype),
            weight_rounding=options.weight_rounding,
            **({"norm_growth_limit": None} if options.no_limiter else {}),
            **({"head_rows": options.head_rows} if options.head_rows != 1 else {}),
            bandwidth=measure_bandwidth() if options.measure else bandwidth,
        )
        if planned.too_narrow and not any(entry.level for entry in planned.entries):
            names = ", ".join(planned.too_narrow[:3]) + (" and so on" if len(planned.too_narrow) > 3 else "")
            raise ValueError(
                f"level {options.level} is too deep for all {len(planned.too_narrow)} matrices of the recipe, so "
                f"that nothing would be transformed: {names} would stay at level 0; use a lower level"
            )
        sharded = _sharded(planned, options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        return _refuse("plan", error)
    if options.json:
        parts = {} if sharded is None else {"sharded": sharded.as_dict()}
        print(json.dumps(planned.as_dict() | parts, indent=1))
    else:
        print(planned.text(verbose=options.verbose), *(() if sharded is None else (sharded,)), sep="\n\n")
    return 0


def _sharded(planned: Plan, options: argparse.Namespace) -> ShardedPlan | None:
    """Return the plan on several processes; None without --world-size and --mesh."""
    from gwt_kernels.mesh import mesh_of
    from gwt_kernels.plan import parse_bandwidth
    from gwt_kernels.plan_sharded import (
        HOST_TIME,
        LATENCY,
        LINK_BANDWIDTH,
        MATRIX_FLOPS,
        parse_seconds,
        plan_sharded,
    )

    if options.world_size is None and options.mesh is None:
        unused = [
            name
            for name in ("clip", "link_bandwidth", "latency", "host_time", "matrix_flops")
            if getattr(options, name) is not None and getattr(options, name) is not False
        ]
        if unused:
            raise ValueError(f"--{unused[0].replace('_', '-')} needs --world-size or --mesh")
        return None
    link, latency, host = options.link_bandwidth, options.latency, options.host_time
    return plan_sharded(
        planned,
        mesh_of(options.world_size, options.mesh),
        clip=options.clip,
        link_bandwidth=LINK_BANDWIDTH if link is None else parse_bandwidth(link),
        latency=LATENCY if latency is None else parse_seconds(latency),
        host_time=HOST_TIME if host is None else parse_seconds(host, "host time"),
        matrix_flops=MATRIX_FLOPS if options.matrix_flops is None else options.matrix_flops,
    )


def _doctor() -> int:
    import torch

    needed = ("triton", "numpy")  # by Triton's interpreter
    if all(map(importlib.util.find_spec, needed)) and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, and for this process alone
    from gwt_kernels import doctor

    return 0 if doctor.report() else 1

"""A plan as text: what each parameter gets, what every option keeps, and what a step moves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gwt_kernels.options import state_dtype_name
from gwt_kernels.param_groups import Decision, describe
from gwt_kernels.plan import Cost, Plan
from gwt_kernels.plan_sharded import Collective, ShardedPlan
from gwt_kernels.state import DEEPEST_QUANTIZED, SMALLEST_QUANTIZED

__all__ = ["parameter_table", "render", "render_sharded"]

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def render(plan: Plan, *, verbose: bool = False) -> str:
    """The plan's tables, aligned.

    Args:
        plan: What to show.
        verbose: A row for every parameter, with its bytes, instead of one for all layers.
    """
    table = describe(Decision(e.name, e.shape, e.level, e.decayed, e.reason) for e in plan.entries)
    if verbose:
        table = "\n".join((parameter_table(plan), *table.splitlines()[-2:]))
    blocks = [
        _header(plan),
        f"What each parameter gets at level {plan.chosen.level}\n{table}",
        _memory(plan),
        _steps(plan),
        *_notes(plan),
    ]
    return "\n\n".join(blocks)


def render_sharded(sharded: ShardedPlan) -> str:
    """What the process with the largest share holds and moves, and the collectives, aligned."""
    return "\n\n".join((_shares(sharded), _collectives(sharded)))


def _shares(sharded: ShardedPlan) -> str:
    plan, held = sharded.plan, sharded.largest
    common = held.weight_bytes + held.gradient_bytes
    unit, size = _unit(common)
    rows: list[tuple[str, ...]] = [
        ("optimizer", "moments", "weights", "gradients", "states", "together", "step moves", "memory, ms",
         "collectives, ms", "host, ms", "step, ms")
    ]  # fmt: skip
    # Of AdamW's host nothing is known here, nor therefore how long its step takes.
    for cost, state, moved, seconds in (
        (plan.adamw[0], held.adamw_state_bytes, held.adamw_moved_bytes, (0.0, None, None)),
        (
            plan.chosen,
            held.state_bytes,
            held.moved_bytes,
            (sharded.collective_seconds, sharded.host_seconds, sharded.seconds),
        ),
    ):
        amounts = (held.weight_bytes, held.gradient_bytes, state, common + state, moved)
        times: list[str] = []
        if plan.bandwidth is not None:
            every = (moved / plan.bandwidth, *seconds)
            times = ["-" if each is None else _three_digits(1e3 * each) for each in every]
        rows.append((_label(cost), _moments(cost), *(f"{amount / size:.3f}" for amount in amounts), *times))
    if plan.bandwidth is None:
        rows = [row[:7] for row in rows]
        speed = "give --bandwidth or --measure for a step's time"
    else:
        speed = (
            f"times predicted for memory of {plan.bandwidth / 1e9:,.1f} GB/s and a host that takes "
            f"{1e6 * sharded.host_time:,.1f} us a tensor"
        )
    excess = 100 * ((common + held.state_bytes) / sharded.even_bytes - 1)
    return (
        f"The largest of {_processes(sharded)}, {unit} ({speed})\n{_aligned(rows, right=range(2, 11))}\n"
        f"It holds {excess:.1f} % more than an even share."
    )


def _processes(sharded: ShardedPlan) -> str:
    n = sharded.mesh.size
    return "1 process" if n == 1 else f"{n:,} processes ({sharded.mesh})"


def _collectives(sharded: ShardedPlan) -> str:
    if not sharded.collectives:
        return "Collectives of a step: none"

    def row(c: Collective) -> tuple[str, ...]:
        seconds = c.seconds(sharded.link_bandwidth, sharded.latency)
        sender = "engine" if c.engine else "optimizer"
        counts = (f"{c.processes:,}", f"{c.calls:,}", f"{c.total_bytes:,}", _three_digits(1e3 * seconds))
        return sender, c.purpose, c.kind, *counts

    heading = ("sent by", "what", "collective", "processes", "calls", "bytes in all", "time, ms")
    table = _aligned([heading, *map(row, sharded.collectives)], right=(3, 4, 5, 6))
    units = ", with one fully_shard a layer and one for the rest," if sharded.mesh.fsdp > 1 else ""
    activations = " Activations, which tensor parallelism sends, are not counted." if sharded.mesh.tp > 1 else ""
    return (
        f"Collectives of a step (times predicted for links of {sharded.link_bandwidth / 1e9:,.1f} GB/s and "
        f"{1e6 * sharded.latency:,.1f} us a message)\n{table}\n"
        f"The optimizer's are in its step's time. The engine's{units} run beside forward and backward.{activations}"
    )


def parameter_table(plan: Plan) -> str:
    """Every parameter on a row of its own, with the bytes of its state and of its part of a step."""
    rows = [("parameter", "shape", "dtype", "level", "decay", "state, B", "moved per step, B", "reason")]
    rows += [
        (
            entry.name,
            str(entry.shape),
            str(entry.dtype).removeprefix("torch."),
            str(entry.level),
            "yes" if entry.decayed else "no",
            f"{entry.state_bytes:,}",
            f"{entry.moved_bytes:,}",
            entry.reason,
        )
        for entry in plan.entries
    ]
    return _aligned(rows, right=(5, 6))


def _header(plan: Plan) -> str:
    dtypes = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in plan.entries}))
    frozen = f"; {_amount(plan.frozen_bytes)} of frozen weights" if plan.frozen_bytes else ""
    return (
        f"{plan.model} from {plan.source}: {_elements(plan):,} trainable parameters, "
        f"{_amount(plan.gradient_bytes)} in {dtypes}, and as much for their gradients{frozen}"
    )


def _memory(plan: Plan) -> str:
    unit, size = _unit(plan.weight_bytes)
    rows = [("", "optimizer", "moments", "states", "weights + states", "of AdamW's states")]
    rows += [
        (
            ">" if cost == plan.chosen else "",
            _label(cost),
            _moments(cost),
            f"{cost.state_bytes / size:.2f}",
            f"{(plan.weight_bytes + cost.state_bytes) / size:.2f}",
            f"{100 * cost.state_bytes / plan.adamw[0].state_bytes:.1f} %",
        )
        for cost in (*plan.adamw, *plan.options)
    ]
    return f"Memory, {unit} (> marks the options asked for)\n{_aligned(rows, right=(3, 4, 5))}"


def _steps(plan: Plan) -> str:
    unit, size = _unit(plan.weight_bytes)
    elements = max(_elements(plan), 1)
    rows: list[tuple[str, ...]] = [
        ("", "optimizer", "moments", f"moved, {unit}", "for the limiter", "bytes/parameter", "time, ms")
    ]
    for cost in (*plan.adamw, *plan.options):
        seconds = plan.seconds(cost)
        rows.append(
            (
                ">" if cost == plan.chosen else "",
                _label(cost),
                _moments(cost),
                f"{cost.moved_bytes / size:.2f}",
                f"{cost.limiter_bytes / size:.2f}",
                f"{cost.moved_bytes / elements:.2f}",
                "" if seconds is None else _three_digits(1e3 * seconds),
            )
        )
    if plan.bandwidth is None:
        rows = [row[:-1] for row in rows]
        title = "A step (give --bandwidth or --measure for its time)"
    else:
        rate = f"{plan.bandwidth / 1e9:,.1f} GB/s"
        title = f"A step, and the time in which {rate} moves its bytes (no launches, no arithmetic, no cache)"
    return f"{title}\n{_aligned(rows, right=(3, 4, 5, 6))}"


def _notes(plan: Plan) -> list[str]:
    notes = []
    for dtype in sorted({cost.moments for cost in (plan.chosen, *plan.options) if not cost.offered}):
        try:
            state_dtype_name(dtype)
        except ValueError as error:
            notes.append(f"* This GWTAdamW takes no {dtype} moments; their rows are computed only: {error}.")
    if not all(cost.offered for cost in plan.adamw):
        notes.append(
            "* torch.optim.AdamW keeps its moments in the weights' dtype: float32 ones take float32 weights, or a "
            "wrapper that keeps a float32 copy of the weights, which is not counted here."
        )
    if plan.too_narrow:
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in plan.too_narrow)
        notes.append(
            f"Too narrow for level {plan.chosen.level}, so at level 0: {', '.join(names)} "
            f"({len(plan.too_narrow)} tensors)."
        )
    if plan.float32_moments:
        names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in plan.float32_moments)
        notes.append(
            f"Moments stay float32, for int8 pays from {SMALLEST_QUANTIZED} coefficients and up to level "
            f"{DEEPEST_QUANTIZED}: {', '.join(names)} ({len(plan.float32_moments)} tensors)."
        )
    if plan.chosen.level and not any(entry.level for entry in plan.entries):
        notes.append("Nothing is transformed, so every level is AdamW: name the matrices with --include.")
    return notes


def _elements(plan: Plan) -> int:
    return sum(math.prod(entry.shape) for entry in plan.entries)


def _label(cost: Cost) -> str:
    return cost.optimizer if cost.level is None else f"GWT level {cost.level}"


def _moments(cost: Cost) -> str:
    return cost.moments if cost.offered else f"{cost.moments} *"


def _unit(size: int) -> tuple[str, int]:
    return next(unit for unit in UNITS if size >= 0.1 * unit[1] or unit[1] == 1)


def _amount(size: int) -> str:
    unit, factor = _unit(size)
    return f"{size / factor:,.2f} {unit}" if factor > 1 else f"{size} B"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )

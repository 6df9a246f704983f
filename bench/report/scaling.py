"""Tables of docs/scaling.md: predictions of what each GPU holds, sends and needs, and measurements."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from bench.report.markdown import duration, number, origin, size, spread, table
from bench.report.rows import Row, Run, of
from bench.scaling.__main__ import REFERENCES
from gwt_kernels.mesh import Mesh, mesh_of
from gwt_kernels.plan import Plan, plan
from gwt_kernels.plan_sharded import ShardedPlan, plan_sharded

BANDWIDTH = 3e12
"""Assumed bandwidth of a GPU's memory, in bytes per second."""
MODELS = ("7b", "70b", "405b")
GPUS = (1, 8, 64, 256, 1024, 4096)
MESHES = ("fsdp=4096", "dp=8,fsdp=512", "fsdp=512,tp=8", "dp=8,fsdp=64,tp=8")
EXAMPLE = ("llama_405b", 4096, "dp=8,fsdp=64,tp=8")


def gpus_table() -> str:
    """Return two tables by model and number of GPUs, all with FSDP2, bf16 weights and bf16 moments.

    The first has what a GPU holds, the second what it sends and the time of a step.
    """
    held_headings = [
        "LLaMA", "GPUs", "weights + gradients", "AdamW's states", "GWT's states", "over an even share",
    ]  # fmt: skip
    time_headings = [
        "LLaMA", "GPUs", "AdamW: memory", "GWT: memory", "GWT: all-reduce", "GWT: host", "GWT's step",
        "sent by all-reduce", "sent by FSDP2", "FSDP2",
    ]  # fmt: skip
    held_rows, time_rows = [], []
    for model in MODELS:
        for n in GPUS:
            sharded = plan_sharded(_planned(model, torch.bfloat16), Mesh(fsdp=n))
            held = sharded.largest
            excess = (held.weight_bytes + held.gradient_bytes + held.state_bytes) / sharded.even_bytes - 1
            sizes = (held.weight_bytes + held.gradient_bytes, held.adamw_state_bytes, held.state_bytes)
            held_rows.append([model.upper(), f"{n:,}", *map(size, sizes), f"{100 * excess:.1f} %"])
            time_rows.append([model.upper(), f"{n:,}", *_times(sharded), *_sent(sharded)])
    return f"{table(held_headings, held_rows)}\n\n{table(time_headings, time_rows)}"


def meshes_table() -> str:
    """Return the Markdown table of the largest model on the most GPUs, by mesh, with float32 moments."""
    headings = [
        "mesh", "weights + gradients", "GWT's states", "AdamW: memory", "GWT: memory", "GWT: all-reduce",
        "GWT: host", "GWT's step", "sent by all-reduce", "sent by the engine", "engine",
    ]  # fmt: skip
    rows = []
    for text in MESHES:
        sharded = plan_sharded(_planned(MODELS[-1], None), mesh_of(GPUS[-1], text))
        held = sharded.largest
        sizes = (held.weight_bytes + held.gradient_bytes, held.state_bytes)
        rows.append([f"`{text}`", *map(size, sizes), *_times(sharded), *_sent(sharded)])
    return table(headings, rows)


def example() -> str:
    """Return the command's output about several processes, below its output about the whole model."""
    model, n, mesh = EXAMPLE
    sharded = plan_sharded(plan(model, dtype=torch.bfloat16, bandwidth=BANDWIDTH), mesh_of(n, mesh), clip=True)
    command = f"gwt-kernels plan {model} --world-size {n} --mesh {mesh} --bandwidth {BANDWIDTH:.1e} --clip"
    return f"```console\n$ {command.replace('e+', 'e')}\n...\n{sharded}\n```"


def measured(runs: Sequence[Run]) -> str:
    """Return predictions and measurements of the newest run."""
    found = of(runs, "scaling")
    return _run(found[0]) if found else "Nothing is recorded yet: `python -m bench.scaling` measures it."


def _run(run: Run) -> str:
    """Return one run: its origin, its steps, and the components timed alone."""
    about, cases = run.rows[-1], _cases(run)
    others = f" {about['note']}" if about["note"] else ""
    headings = [
        "processes", "step", "state bytes", "collectives", "their bytes", "CPU, ms: predicted", "measured",
        "off by", "wall, ms: predicted", "measured", "off by",
    ]  # fmt: skip
    rows = []
    for (n, setting), found in cases.items():
        if setting is None:
            continue
        counts = [
            f"{found[metric]['median']:,.0f}" for metric in ("state_bytes", "collectives", "collective_bytes")
        ]
        times: list[str] = []
        for metric in ("step_cpu_time", "step_time"):
            # The other wall times are stretched like those of the reference on as many processes.
            is_input = setting in REFERENCES.values() and (n == 1 or metric == "step_time")
            predicted = found[f"predicted_{metric}"]["median"]
            off = found[metric]["median"] / predicted - 1
            times += ["input" if is_input else number(1e3 * predicted), spread(found[metric], 1e3)]
            times.append("" if is_input else f"{100 * off:+.0f} %")
        rows.append([str(n), setting, *counts, *times])
    heading = f"{about['device']}, {about['cores']} cores, {about['model']}, level {about['level']}."
    return "\n\n".join(
        [f"{heading}{others} {origin(run)}.", table(headings, rows, left=2), _pieces(run, list(cases))]
    )


def _cases(run: Run) -> dict[tuple[int, str | None], dict[str, Row]]:
    cases: dict[tuple[int, str | None], dict[str, Row]] = {}
    for row in run.rows:
        found = cases.setdefault((row["processes"], row["setting"]), {})
        found[f"{row['metric']} {row['bytes']}" if "bytes" in row else row["metric"]] = row
    return cases


def _pieces(run: Run, keys: Sequence[tuple[int, str | None]]) -> str:
    """Return the components timed alone, by the number of processes that ran them at once."""
    cases = _cases(run)
    numbers = dict.fromkeys(n for n, _ in keys)
    sizes = sorted({row["bytes"] for row in run.rows if "bytes" in row})
    headings = [
        "processes",
        "wall over CPU time",
        "copy by each, GB/s",
        *(f"all-reduce of {s:,} bytes, ms" for s in sizes),
    ]
    rows = []
    for n in numbers:
        alone, crowding = cases[n, None], cases[n, REFERENCES["gwt"]]["crowding"]
        reduces = [spread(alone.get(f"all_reduce_time {each}"), 1e3) for each in sizes]
        rows.append([str(n), number(crowding["median"]), spread(alone["copy_bandwidth"], 1e-9), *reduces])
    return table(headings, rows)


@functools.cache
def _planned(model: str, moments: torch.dtype | None) -> Plan:
    return plan(f"llama_{model}", dtype=torch.bfloat16, state_dtype=moments, bandwidth=BANDWIDTH)


def _times(sharded: ShardedPlan) -> list[str]:
    adamw = sharded.largest.adamw_moved_bytes / BANDWIDTH
    own = (sharded.memory_seconds or 0.0, sharded.collective_seconds, sharded.host_seconds, sharded.seconds or 0.0)
    times = (adamw, *own)
    return [duration(seconds) for seconds in times]


def _sent(sharded: ShardedPlan) -> list[str]:
    """Return the bytes of the optimizer's collectives, and bytes and seconds of the engine's."""
    own = sum(c.total_bytes for c in sharded.collectives if not c.engine)
    engine = sum(c.total_bytes for c in sharded.collectives if c.engine)
    return [size(own), size(engine), duration(sharded.engine_seconds)]

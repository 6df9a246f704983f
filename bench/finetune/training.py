"""One fine-tuning run, in its own process, so that the process's peak memory is that of the run."""

from __future__ import annotations

import math
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from bench.common.measure import facts
from bench.finetune.models import build_model, optimizer_of
from bench.finetune.tasks import Task, checksum
from bench.pretrain.clocks import OptimizerTimer, Stopwatch
from bench.pretrain.optimizers import measured_state_bytes

MODULE = "bench.finetune"
CHECK_EVERY = 10  # steps between checks of the loss, for which the host waits


@dataclass(frozen=True)
class RunConfig:
    """The settings that, with the data, decide a run's numbers."""

    model: str
    """Folder of a pre-trained model."""
    optimizer: str
    recipe: str
    """The part that is trained: one of `bench.finetune.models.RECIPES`."""
    lr: float
    """Peak rate of head, embeddings, norms and biases."""
    scale: float
    """Rate of matrices, or of adapters, over `lr`."""
    steps: int
    batch: int
    warmup: float
    """Share of the steps over which the rate rises, before it falls linearly to 0."""
    weight_decay: float
    grad_clip: float
    """Largest gradient norm; 0 for no clipping."""
    seed: int
    """Seed of a new head or adapters, of dropout and of the order of the batches."""
    precision: str
    """`float32`, `bfloat16` (weights too), or `mixed` (float32 weights, bfloat16 activations)."""
    rank: int
    """Rank of adapters."""


def lr_factor(step: int, *, steps: int, warmup: float) -> float:
    """Return the rate over its peak at `step` (1 for the first): it rises, then falls to 0, both linearly."""
    rise = max(1, round(warmup * steps))
    return step / rise if step <= rise else (steps + 1 - step) / (steps + 1 - rise)


def train(config: RunConfig, task: Task, device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Fine-tune and evaluate.

    Returns:
        Settings and facts; `validation` and `test` with `loss` and, if there are labels, `accuracy`;
        `untrained_loss` on the test if the model keeps its own head; numbers of parameters and of trained ones,
        bytes of optimizer state, peak memory of the process (of the device on CUDA), and times of steps.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    model = build_model(config.model, task.classes, config.recipe, rank=config.rank, dtype=dtype, pad=task.pad)
    model = model.to(device)
    optimizer = optimizer_of(
        model, config.optimizer, config.recipe, lr=config.lr, scale=config.scale, weight_decay=config.weight_decay
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "mixed" else nullcontext()

    def evaluate(part: str) -> dict[str, float]:
        model.eval()
        with torch.no_grad(), autocast:
            return task.evaluate(model, part, device)

    untrained = None if task.classes else evaluate("test")["loss"]
    timer, stopwatch, digest = OptimizerTimer(device), Stopwatch(device), 0
    batches = task.deal(config.batch, config.seed)
    model.train()
    stopwatch.start()
    for step in range(1, config.steps + 1):
        batch = next(batches)
        digest = checksum(batch, digest)
        with autocast:
            loss = task.loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        loss.backward()
        if config.grad_clip > 0:
            clip_grad_norm_(trained, config.grad_clip)
        factor = lr_factor(step, steps=config.steps, warmup=config.warmup)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        with timer:
            optimizer.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0 or step == config.steps:
            _check_finite(float(loss.detach()), step, config)
    seconds = stopwatch.stop()
    tested = evaluate("test")
    found = {"validation": evaluate("validation") if task.facts["validation_size"] else tested, "test": tested}
    _check_finite(found["validation"]["loss"], config.steps, config)
    return {
        **asdict(config),
        **task.facts,
        **found,
        "untrained_loss": untrained,
        "parameters": _count(model.parameters()),
        "trained_parameters": _count(trained),
        "state_bytes": measured_state_bytes(optimizer),
        "peak_bytes": peak_bytes(device),
        "optimizer_ms": timer.milliseconds(),
        "step_seconds": seconds / config.steps,
        "data_digest": f"{digest:08x}",
        **facts(device, MODULE, sys.argv[1:]),
    }


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _check_finite(loss: float, step: int, config: RunConfig) -> None:
    if not math.isfinite(loss):
        rates = f"lower --lr ({config.lr:g}) or --scale ({config.scale:g})"
        raise FloatingPointError(f"{config.optimizer}: the loss is {loss} at step {step}; {rates}")


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process, or on CUDA of its tensors; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # not `getrusage`, whose peak starts from the parent's
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def train_apart(config: RunConfig, task: Task, device: torch.device, threads: int | None) -> dict[str, Any]:
    """Run `train` in a new process.

    Raises:
        FloatingPointError: The loss is not finite.
        MemoryError: The process was ended from outside, as the system does when memory runs out.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(train, config, task, device, threads).result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "the process was ended from outside, as when memory runs out; lower --batch or --max-length"
            ) from error
        except KeyboardInterrupt:  # the pool would wait until the run has ended
            for process in multiprocessing.active_children():
                process.terminate()
            raise

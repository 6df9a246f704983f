"""One pre-training run: schedule, accumulation, evaluation, log, checkpoint and exact resume."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench import checkpoint
from bench.contenders import build_optimizer, measured_state_bytes, predicted_state_bytes
from bench.data import Corpus
from bench.measure import facts
from bench.models import build_model, load_config


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers; a run resumes only under the same values."""

    model: str
    optimizer: str
    lr: float
    scale: float
    steps: int
    batch: int
    """Windows per forward pass."""
    accumulate: int
    """Forward passes per optimizer step."""
    context: int
    warmup: float
    """Share of the steps over which the rate rises."""
    min_lr: float
    """Share of the peak rate that the cosine ends at."""
    weight_decay: float
    grad_clip: float
    """Largest gradient norm; 0 for no clipping."""
    evals: int
    """Evaluations, evenly spaced; the last one after the last step."""
    seed: int
    precision: str
    """`float32`, `bfloat16` (weights too), or `mixed` (float32 weights, bfloat16 activations)."""
    projection_gap: int | None = None
    """Steps between new projections, for the optimizers that have them."""


def lr_factor(step: int, *, steps: int, warmup: float, min_lr: float) -> float:
    """Share of the peak rate at `step` (1 for the first): a linear rise, then a cosine down to `min_lr`."""
    rise = max(1, round(warmup * steps))
    if step <= rise:
        return step / rise
    progress = (step - rise) / max(1, steps - rise)
    return min_lr + (1.0 - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, in float32, over windows `[batch, context + 1]` of token ids."""
    windows = windows.long()
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class OptimizerTimer:
    """Times `optimizer.step()`; on CUDA by events, which cost no synchronisation until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._begin = self._mark()

    def __exit__(self, *_: object) -> None:
        self._marks.append((self._begin, self._mark()))

    def milliseconds(self) -> dict[str, float] | None:
        """Median, 20th and 80th percentile and number of steps, the first few left out; None without enough."""
        marks = self._marks[3:]
        if len(marks) < 2:
            return None
        if self._cuda:
            torch.cuda.synchronize()
            times = [begin.elapsed_time(end) for begin, end in marks]
        else:
            times = [1e3 * (end - begin) for begin, end in marks]
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return {"p20": fifths[0], "median": statistics.median(times), "p80": fifths[3], "samples": len(times)}


class Stopwatch:
    """Seconds of training; evaluations and checkpoints are no training, and it stands still while they last."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> float:
        """Stop once the device has finished what it was given, and return the seconds so far."""
        if self._began is not None:
            if self._cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._began
            self._began = None
        return self.seconds


class Run:
    """A run in memory: model, optimizer, text and the step it has reached."""

    def __init__(self, config: RunConfig, corpus: Corpus, device: torch.device, *, compiled: bool = False) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        model_config = load_config(config.model)
        self.vocabulary: int = model_config.vocab_size
        self._check_ids(corpus.heldout)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.model = build_model(model_config, seed=config.seed, device=device, dtype=dtype)
        self.optimizer = build_optimizer(
            config.optimizer,
            self.model,
            lr=config.lr,
            scale=config.scale,
            weight_decay=config.weight_decay,
            projection_gap=config.projection_gap,
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._forward: nn.Module = torch.compile(self.model) if compiled else self.model  # type: ignore[assignment]
        self.step = 0
        self.loss_sum = torch.zeros((), device=device)
        """Training loss summed since the last line of the log."""
        self.loss_count = 0
        self.data_digest = 0
        self.timer = OptimizerTimer(device)
        self.stopwatch = Stopwatch(device)

    def _check_ids(self, windows: Tensor) -> None:
        largest = int(windows.max())
        if largest >= self.vocabulary:
            raise ValueError(
                f"token id {largest} is outside the vocabulary of --model {self.config.model}, "
                f"{self.vocabulary} ids; choose another --tokenizer, or a model with a larger vocab_size"
            )

    def _autocast(self) -> Any:
        if self.config.precision == "mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def train_step(self) -> None:
        """One optimizer step over `accumulate` batches."""
        config = self.config
        self.model.train()
        self.step += 1
        for _ in range(config.accumulate):
            windows = self.corpus.train.take(config.batch)
            self._check_ids(windows)
            self.data_digest = zlib.crc32(windows.contiguous().numpy().data, self.data_digest)
            with self._autocast():
                loss = loss_of(self._forward, windows.to(self.device)) / config.accumulate
            loss.backward()
            self.loss_sum += loss.detach()
        self.loss_count += 1
        if config.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        factor = lr_factor(self.step, steps=config.steps, warmup=config.warmup, min_lr=config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        try:
            with self.timer:
                self.optimizer.step()
        except torch.linalg.LinAlgError as error:  # GaLore's decomposition of a gradient that is not finite
            raise FloatingPointError(self._diverged(f"{error}")) from error
        self.optimizer.zero_grad()

    def train_loss(self) -> float:
        """Mean training loss since this was last asked; the only wait for the device in training."""
        loss = float(self.loss_sum) / max(1, self.loss_count)
        self.loss_sum.zero_()
        self.loss_count = 0
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged(f"the loss is {loss}"))
        return loss

    def _diverged(self, what: str) -> str:
        config = self.config
        rates = f"lower --lr ({config.lr:g}) or --scale ({config.scale:g})"
        return f"{config.optimizer}: {what} at step {self.step}; {rates}"

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss over the held-out windows, in nats per token."""
        self.model.eval()
        parts = self.corpus.heldout.split(self.config.batch)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._autocast():
            for part in parts:
                total += loss_of(self._forward, part.to(self.device)).double() * len(part)
        return float(total) / len(self.corpus.heldout)

    def _identity(self) -> dict[str, Any]:
        return asdict(self.config) | dict(self.corpus.facts)

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `load` continues bit for bit."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        payload = {
            "run": self._identity(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "data_digest": self.data_digest,
            "seconds": self.stopwatch.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.corpus.train.state_dict(),
            "random": random,
        }
        checkpoint.write_atomically(path, payload)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: It belongs to a run with other settings or another text.
        """
        saved = checkpoint.read(path)
        checkpoint.check_same_run(path, saved["run"], self._identity())
        self.step, self.loss_count, self.data_digest = (
            saved["step"],
            saved["loss_count"],
            saved["data_digest"],
        )
        self.stopwatch.seconds = saved["seconds"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.corpus.train.load_state_dict(saved["data"])
        torch.set_rng_state(saved["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)


class Log:
    """A JSON-lines file; on resume, lines past the checkpoint's step are dropped, since they come again."""

    def __init__(self, path: Path, *, upto: int | None) -> None:
        kept = []
        if upto is not None and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= upto]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self.empty = not kept

    def write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind (`run`, `train`, `eval`) of a run's log."""
    return [entry for line in path.read_text().splitlines() if (entry := json.loads(line))["kind"] == kind]


def read_result(out: Path) -> dict[str, Any]:
    """What `train` left in the folder of a run."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def train(
    config: RunConfig,
    corpus: Corpus,
    out: Path,
    *,
    device: torch.device,
    compiled: bool = False,
    resume: bool = False,
    stop_at: int | None = None,
    save_every: int = 0,
    log_every: int = 10,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, or go on training, and leave `log.jsonl`, `checkpoint.pt` and `result.json` in `out`.

    Args:
        config: What decides the numbers.
        corpus: The text; one freshly loaded for this run.
        out: Folder of the run; created.
        device: Where to train.
        compiled: Run the model through `torch.compile`.
        resume: Continue from `checkpoint.pt` in `out` where there is one.
        stop_at: End early after this step, with a checkpoint to resume from.
        save_every: Steps between checkpoints; 0 for one at the end only.
        log_every: Steps between lines of training loss.
        progress: Show a progress bar.

    Returns:
        What `result.json` holds: the settings, the losses, the bytes of optimizer state predicted and held,
        the time per optimizer step, the seconds of training, and the facts about machine and versions.

    Raises:
        FloatingPointError: The loss is no longer finite.
        ValueError: `out` holds a run with other settings and `resume` is set.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    run = Run(config, corpus, device, compiled=compiled)
    predicted = predicted_state_bytes(run.optimizer)
    resumed = resume and path.exists()
    if resumed:
        run.load(path)
        if run.step == config.steps and (out / "result.json").exists():
            return read_result(out)
    log = Log(out / "log.jsonl", upto=run.step if resumed else None)
    if log.empty:
        log.write(kind="run", step=0, **asdict(config), **corpus.facts)
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    every = max(1, math.ceil(config.steps / config.evals))
    heldout = math.nan
    tokens_a_step = config.batch * config.accumulate * config.context
    with tqdm(total=config.steps, initial=run.step, desc=config.optimizer, disable=not progress) as bar:
        run.stopwatch.start()
        while run.step < last:
            run.train_step()
            bar.update()
            if run.step % log_every == 0 or run.step == config.steps:
                loss = run.train_loss()
                rates = [group["lr"] for group in run.optimizer.param_groups]
                log.write(kind="train", step=run.step, loss=loss, lr=rates)
                bar.set_postfix(loss=f"{loss:.3f}", heldout=f"{heldout:.3f}", refresh=False)
            if run.step % every == 0 or run.step == config.steps:
                seconds = run.stopwatch.stop()
                heldout = run.heldout_loss()
                tokens = run.step * tokens_a_step
                log.write(kind="eval", step=run.step, loss=heldout, tokens=tokens, seconds=seconds)
                run.stopwatch.start()
            if run.step == last or (save_every and run.step % save_every == 0):
                run.stopwatch.stop()
                run.save(path)
                run.stopwatch.start()
        run.stopwatch.stop()
    log.close()
    evaluations = read_log(out / "log.jsonl", "eval")
    result = {
        **asdict(config),
        **corpus.facts,
        "step": run.step,
        "heldout_loss": evaluations[-1]["loss"] if evaluations else None,
        "evaluations": evaluations,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "state_bytes_predicted": predicted,
        "state_bytes_measured": measured_state_bytes(run.optimizer),
        "optimizer_ms": run.timer.milliseconds(),
        "seconds": run.stopwatch.seconds,
        "data_digest": f"{run.data_digest:08x}",
        **facts(device, "bench.pretrain", sys.argv[1:]),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result

"""One pre-training run: schedule, accumulation, evaluation, log, checkpoint and exact resume."""

from __future__ import annotations

import json
import math
import sys
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from bench.common.measure import facts
from bench.common.models import load_config
from bench.pretrain import checkpoint, sharded_checkpoint
from bench.pretrain.clocks import OptimizerTimer, Stopwatch
from bench.pretrain.data import Corpus
from bench.pretrain.optimizers import build_optimizer, measured_state_bytes, predicted_state_bytes
from bench.pretrain.parallel import Processes


@dataclass(frozen=True)
class RunConfig:
    """The settings that decide a run's numbers; a run resumes only under the same values."""

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
    """Final learning rate of the cosine over the peak."""
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
    momentum: float | None = None
    """Muon's momentum; None for its default, and for other optimizers."""


def lr_factor(step: int, *, steps: int, warmup: float, min_lr: float) -> float:
    """Return the learning rate over its peak at `step` (1 for the first): linear warm-up, cosine to `min_lr`."""
    rise = max(1, round(warmup * steps))
    if step <= rise:
        return step / rise
    progress = (step - rise) / max(1, steps - rise)
    return min_lr + (1.0 - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token, in float32, over windows `[batch, context + 1]` of token
    ids.
    """
    windows = windows.long()
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class Run:
    """A run in memory: model, optimizer, text and current step; with several processes, this one's part."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        device: torch.device,
        *,
        compiled: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        self.processes = processes or Processes(None, device)
        self.processes.check_batch(config.batch)
        model_config = load_config(config.model)
        self.vocabulary: int = model_config.vocab_size
        self._check_ids(corpus.heldout)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.model = self.processes.build(model_config, seed=config.seed, dtype=dtype)
        self.optimizer = build_optimizer(
            config.optimizer,
            self.model,
            lr=config.lr,
            scale=config.scale,
            weight_decay=config.weight_decay,
            projection_gap=config.projection_gap,
            momentum=config.momentum,
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._forward = self.processes.wrap(self.model, compiled=compiled)
        self.step = 0
        self.loss_sum = torch.zeros((), device=device)
        """Training loss of this process's windows, summed since the last line of the log."""
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
        """Take one optimizer step over `accumulate` batches."""
        config = self.config
        self.model.train()
        self.step += 1
        for _ in range(config.accumulate):
            windows = self.corpus.train.take(config.batch)
            self._check_ids(windows)
            self.data_digest = zlib.crc32(windows.contiguous().numpy().data, self.data_digest)
            with self._autocast():
                own = self.processes.share(windows).to(self.device)
                loss = loss_of(self._forward, own) / config.accumulate
            loss.backward()
            self.loss_sum += loss.detach()
        self.loss_count += 1
        if config.grad_clip > 0:
            self.processes.clip(self.model.parameters(), config.grad_clip)
        factor = lr_factor(self.step, steps=config.steps, warmup=config.warmup, min_lr=config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        try:
            with self.timer:
                self.optimizer.step()
        except torch.linalg.LinAlgError as error:  # GaLore's decomposition of a non-finite gradient
            raise FloatingPointError(self._diverged(f"{error}")) from error
        self.optimizer.zero_grad()

    def train_loss(self) -> float:
        """Return the mean training loss since the last call; the only host synchronisation in training."""
        loss = float(self.processes.mean(self.loss_sum)) / max(1, self.loss_count)
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
        """Return the mean loss over the held-out windows, in nats per token."""
        self.model.eval()
        parts = self.corpus.heldout.split(self.config.batch)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._autocast():
            for part in parts:
                own, counting = self.processes.weighted_share(part)
                total += loss_of(self._forward, own.to(self.device)).double() * counting
        return float(self.processes.total(total)) / len(self.corpus.heldout)

    def _identity(self) -> dict[str, Any]:
        return asdict(self.config) | dict(self.corpus.facts)

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `load` continues bit for bit, on the same number of processes."""
        about = {
            "run": self._identity(),
            "step": self.step,
            "loss_sum": self.processes.mean(self.loss_sum),
            "loss_count": self.loss_count,
            "data_digest": self.data_digest,
            "seconds": self.stopwatch.seconds,
            "data": self.corpus.train.state_dict(),
        }
        if self.processes.mode is not None:
            # Training draws no random numbers from torch's own generator, whose state differs between processes.
            sharded_checkpoint.save(path, self._state(), about, self.step, self.processes)
            return
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.write_atomically(path, {**about, **state, "random": random})

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: The checkpoint is damaged or belongs to a run with other settings or another text.
        """
        if self.processes.mode is not None:
            path, saved = sharded_checkpoint.read_about(path, self.processes)
        else:
            saved = checkpoint.read(path)
        checkpoint.check_same_run(path, saved.get("run"), self._identity())
        if self.processes.mode is not None:
            state = sharded_checkpoint.read_state(path, self._state())
            set_model_state_dict(self.model, state["model"])
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        else:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in saved["random"]:
                torch.cuda.set_rng_state(saved["random"]["cuda"], self.device)
        self.step, self.loss_count, self.data_digest = (
            saved["step"],
            saved["loss_count"],
            saved["data_digest"],
        )
        self.stopwatch.seconds = saved["seconds"]
        self.loss_sum.copy_(saved["loss_sum"])
        self.corpus.train.load_state_dict(saved["data"])


class Log:
    """A JSON-lines file; on resume, lines after the checkpoint's step are dropped, since they are written again.

    Args:
        path: Path of the file.
        upto: The step of the checkpoint; None for a new file.
        writes: False on the processes that write no log.
    """

    def __init__(self, path: Path, *, upto: int | None, writes: bool = True) -> None:
        self._file = None
        self.empty = False
        if not writes:
            return
        kept = []
        if upto is not None and path.exists():
            kept = [json.dumps(entry) for entry in _entries(path) if entry["step"] <= upto]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self.empty = not kept

    def write(self, **fields: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without a last one that a crash has cut short."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or start a new run in another --out") from error


def read_log(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind (`run`, `train`, `eval`) of a run's log."""
    return [entry for entry in _entries(path) if entry["kind"] == kind]


def read_result(out: Path) -> dict[str, Any]:
    """Return the result that `train` left in the folder of a run."""
    path = out / "result.json"
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or start a new run in another --out") from error
    return result


def train(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    save_every: int = 0,
    log_every: int = 10,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, or resume training, and write `log.jsonl`, `result.json` and `checkpoint.pt` to `out`.

    With several processes each calls this; the first writes log and result, and all write the checkpoints together,
    in the folder `checkpoints`.

    Args:
        run: The run, at its first step, with a text that was freshly loaded for it.
        out: Folder of the run; created.
        resume: Continue from `checkpoint.pt` in `out` if it exists.
        stop_at: End early after this step, with a checkpoint to resume from.
        save_every: Steps between checkpoints; 0 for one at the end only.
        log_every: Steps between lines of training loss.
        progress: Show a progress bar.

    Returns:
        The contents of `result.json`: the settings, the losses, the bytes of optimizer state predicted and held,
        the time per optimizer step, the seconds of training, and the facts about machine and versions.

    Raises:
        FloatingPointError: The loss is no longer finite.
        ValueError: `resume` is set, and `out` holds a run with other settings, one of another kind of checkpoint
            or a damaged one.
    """
    out.mkdir(parents=True, exist_ok=True)
    config, corpus, processes = run.config, run.corpus, run.processes
    predicted = predicted_state_bytes(run.optimizer)
    path, resumed = _checkpoint_of(out, processes, resume)
    if resumed:
        run.load(path)
        if run.step == config.steps and (out / "result.json").exists():
            return read_result(out)
    log = Log(out / "log.jsonl", upto=run.step if resumed else None, writes=processes.is_first)
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
    evaluations = read_log(out / "log.jsonl", "eval") if processes.is_first else []
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
        "processes": processes.world,
        "parallel": processes.mode,
        **facts(run.device, "bench.pretrain", sys.argv[1:]),
    }
    if processes.is_first:
        checkpoint.write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _checkpoint_of(out: Path, processes: Processes, resume: bool) -> tuple[Path, bool]:
    """Return the path of a run's checkpoint, and whether to continue from it."""
    single, several = out / "checkpoint.pt", out / "checkpoints"
    if processes.mode is None:
        if resume and sharded_checkpoint.exists(several) and not single.exists():
            raise ValueError(
                f"{several} is of several processes: resume with torchrun and --parallel, on any number"
            )
        return single, resume and single.exists()
    found = processes.on_first(lambda: (sharded_checkpoint.exists(several), single.exists()))
    if resume and found == (False, True):
        raise ValueError(
            f"{single} is of a single process: resume without --parallel, or start anew in another --out"
        )
    return several, resume and found[0]

"""Lightning's Trainer on the tiny model, with GWTAdamW and a record of the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.tiny import llama, optimizer_of, sentences

pl = pytest.importorskip("pytorch_lightning", reason="needs Lightning: pip install pytorch-lightning")
ModelCheckpoint = pl.callbacks.ModelCheckpoint


class Language(pl.LightningModule):
    """A tiny LLaMA that records the gradients of every step as its optimizer gets them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model = llama()
        self.options = options
        self.seen: list[list[torch.Tensor]] = []
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self, **self.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.seen.append([p.grad.clone() for p in self.parameters()])
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(
    folder: Path,
    resume: str | None = None,
    *,
    count: int = 24,
    max_grad_norm: float | None = None,
    telemetry: bool = False,
    **options: Any,
) -> tuple[Language, Any]:
    """Train on batches of four for six steps; return the module and its optimizer."""
    module = Language(max_grad_norm=max_grad_norm, telemetry=telemetry)
    chosen: dict[str, Any] = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "gradient_clip_val": 0.5,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(**{**chosen, **options})
    trainer.fit(module, DataLoader(sentences(count), batch_size=4), ckpt_path=resume)  # type: ignore[arg-type]
    return module, trainer.optimizers[0]

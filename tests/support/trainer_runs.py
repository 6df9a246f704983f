"""Hugging Face's Trainer on the tiny model, with GWTAdamW by each of the two routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import GROUPS, NUMBERS, llama, sentences

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")

from transformers import Trainer, TrainingArguments

from gwt_kernels.integrations.transformers import GWTTrainerMixin, gwt_optimizer

OPTIONS = {name: value for name, value in GROUPS.items() if name != "weight_decay"}


class MixedTrainer(GWTTrainerMixin, Trainer):
    pass


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": NUMBERS["lr"],
        "adam_beta1": NUMBERS["betas"][0],
        "adam_beta2": NUMBERS["betas"][1],
        "adam_epsilon": NUMBERS["eps"],
        "weight_decay": GROUPS["weight_decay"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return TrainingArguments(**{**chosen, **options})


def with_mixin(args: TrainingArguments, dtype: torch.dtype = torch.float32, **options: Any) -> Trainer:
    return MixedTrainer(llama().to(dtype), args, train_dataset=sentences(), gwt_options={**OPTIONS, **options})


def with_factory(args: TrainingArguments, dtype: torch.dtype = torch.float32, **options: Any) -> Trainer:
    made = gwt_optimizer(args, **{**OPTIONS, **options})
    return Trainer(llama().to(dtype), args, train_dataset=sentences(), optimizer_cls_and_kwargs=made)

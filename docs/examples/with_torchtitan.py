"""GWTAdamW, or GWTMuon, in torchtitan: an optimizer configuration to put in the place of `default_adamw(...)`."""

from dataclasses import dataclass, field
from typing import Any

import tiny
from torch import nn
from torch.utils.data import DataLoader
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from gwt_kernels import GWTAdamW, gwt_param_groups


class GWTOptimizers(OptimizersContainer):
    """One optimizer for each part of the model; which matrices are transformed follows `gwt_param_groups`."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        lr: float = 1e-3
        groups: dict[str, Any] = field(default_factory=dict)
        """Options of `gwt_param_groups`: level, scale, weight_decay, include, exclude."""
        kind: Any = GWTAdamW
        """The optimizer: `GWTAdamW`, `GWTMuon` or another of gwt_kernels."""
        options: dict[str, Any] = field(default_factory=dict)
        """Its options: state_dtype, weight_rounding, betas and so on."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups:
            raise ValueError("param_groups are made by gwt_param_groups: say what to leave out with groups={...}")
        self.model_parts = model_parts
        self.optimizers = [
            config.kind(gwt_param_groups(part, **config.groups), lr=config.lr, **config.options)
            for part in model_parts
        ]
        every = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        self._validate_params(every)
        self._post_init(every)


def gwt_adamw(
    lr: float = 1e-3, *, kind: Any = GWTAdamW, groups: dict[str, Any] | None = None, **options: Any
) -> GWTOptimizers.Config:
    """What `Trainer.Config(optimizer=...)` takes."""
    return GWTOptimizers.Config(lr=lr, groups=groups or {"weight_decay": 0.1}, kind=kind, options=options)


if __name__ == "__main__":  # what torchtitan's trainer does with the configuration
    model = tiny.model()
    optimizers = gwt_adamw(lr=0.02).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=10)
    schedulers = schedule.build(optimizers=optimizers, training_steps=100)
    losses = []
    for _ in range(4):
        for batch in DataLoader(tiny.Text(), batch_size=8):
            optimizers.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizers.step()
            schedulers.step()
            losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

"""Log GWTAdamW's telemetry to Lightning's loggers; the optimizer itself needs only ``configure_optimizers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gwt_kernels.integrations.telemetry import HasTelemetry, check_every, missing, scalars, with_telemetry

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError as error:
            raise missing(__name__, "lightning", "lightning (or pytorch-lightning)") from error


__all__ = ["TelemetryCallback"]


class TelemetryCallback(Callback):
    """Log `GWTAdamW`'s telemetry to the loggers of a Lightning Trainer.

    The scalars are named ``telemetry/<what>/<parameter>``. Optimizers without telemetry are left out.

    ::

        Trainer(logger=TensorBoardLogger("runs"), callbacks=[TelemetryCallback(every=50)])

    Args:
        every: Optimizer steps between two logs.

    Raises:
        ValueError: ``every`` is not an integer of at least 1; at the start of training: the trainer has no logger;
            after the first step: telemetry is off in every optimizer.
        TypeError: at the start of training: no optimizer has telemetry.
    """

    def __init__(self, *, every: int = 50) -> None:
        self.every = check_every(every)
        self._optimizers: list[HasTelemetry] = []
        self._step = 0
        self._checked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers' telemetry."""
        if not trainer.loggers:
            raise ValueError("there is no logger to log to: pass logger=TensorBoardLogger(...) to Trainer")
        self._optimizers = with_telemetry(trainer.optimizers)
        self._step = trainer.global_step
        self._checked = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if optimizer steps have passed a multiple of ``every``."""
        step = trainer.global_step
        due = step // self.every > self._step // self.every
        if due or (step > self._step and not self._checked):
            measured = scalars(self._optimizers)
            self._checked = True
            for logger in trainer.loggers if due else ():
                logger.log_metrics(measured, step=step)
        self._step = step

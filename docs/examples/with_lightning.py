"""GWTAdamW in Lightning: configure_optimizers, clipping, accumulation, and a checkpoint to go on from."""

import tempfile

import pytorch_lightning as pl  # or: import lightning.pytorch as pl
import tiny
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from gwt_kernels import GWTAdamW, gwt_param_groups


class Language(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny.model()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = GWTAdamW(gwt_param_groups(self, level=2, weight_decay=0.1), lr=0.02)
        warm_up = LinearLR(optimizer, start_factor=0.05, total_iters=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def train(epochs, checkpoint=None):
    trainer = pl.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_progress_bar=False,
    )
    module = Language()
    trainer.fit(module, DataLoader(tiny.Text(), batch_size=8), ckpt_path=checkpoint)
    return module, trainer.checkpoint_callback.best_model_path


begun, checkpoint = train(epochs=2)
resumed, _ = train(epochs=4, checkpoint=checkpoint)

print(f"loss {begun.losses[0]:.2f} -> {resumed.losses[-1]:.2f}")

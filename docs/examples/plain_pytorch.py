"""GWTAdamW in a plain PyTorch loop: warm-up, clipping, accumulation, and a checkpoint to go on from."""

import tempfile
from pathlib import Path

import tiny
import torch
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from gwt_kernels import GWTAdamW, gwt_param_groups


def build():
    model = tiny.model()
    optimizer = GWTAdamW(gwt_param_groups(model, level=2, weight_decay=0.1), lr=0.02)
    return model, optimizer, LinearLR(optimizer, start_factor=0.05, total_iters=10)


def train(model, optimizer, warm_up, epochs):
    losses = []
    for _ in range(epochs):
        for i, batch in enumerate(DataLoader(tiny.Text(), batch_size=8)):
            loss = model(**batch).loss
            (loss / 2).backward()  # two micro-batches make a step
            if i % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                warm_up.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


checkpoint = Path(tempfile.mkdtemp()) / "checkpoint.pt"

model, optimizer, warm_up = build()
losses = train(model, optimizer, warm_up, epochs=2)
parts = {"model": model, "optimizer": optimizer, "warm_up": warm_up}
torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)

model, optimizer, warm_up = build()  # a new process would begin here
saved = torch.load(checkpoint, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
warm_up.load_state_dict(saved["warm_up"])
losses += train(model, optimizer, warm_up, epochs=2)

print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

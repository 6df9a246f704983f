"""GWTAdamW under Accelerate: bfloat16 autocast, accumulation, clipping, and a state to go on from."""

import tempfile

import tiny
from accelerate import Accelerator
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from gwt_kernels import GWTAdamW, gwt_param_groups

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)


def build():
    model = tiny.model()
    optimizer = GWTAdamW(gwt_param_groups(model, level=2, weight_decay=0.1), lr=0.02)
    warm_up = LinearLR(optimizer, start_factor=0.05, total_iters=10)
    return accelerator.prepare(model, optimizer, warm_up, DataLoader(tiny.Text(), batch_size=8, shuffle=True))


def train(model, optimizer, warm_up, data, epochs):
    losses = []
    for _ in range(epochs):
        for batch in data:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                warm_up.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


folder = tempfile.mkdtemp()
losses = train(*build(), epochs=2)
accelerator.save_state(folder)

accelerator.free_memory()  # a new process would begin here
parts = build()
accelerator.load_state(folder)
losses += train(*parts, epochs=2)

print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

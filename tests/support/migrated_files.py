"""A small LLaMA, and ``gwt-kernels migrate`` on files of its optimizers' states."""

from __future__ import annotations

import torch

from gwt_kernels import GWTAdamW, gwt_param_groups
from gwt_kernels.cli import main

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


def step(model, optimizer, *seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        tokens = torch.randint(0, 61, (2, 16))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def run(checkpoint, out, config, *more):
    return main(["migrate", str(checkpoint), "--config", str(config), "--out", str(out), *map(str, more)])


def file_of(folder, payload, name="optimizer.pt"):
    torch.save(payload, folder / name)
    return folder / name


def read(path):
    return torch.load(path, weights_only=True)


def groups_of(trained, **options):
    return GWTAdamW(
        gwt_param_groups(trained.model, weight_decay=0.1), lr=0.003, betas=(0.8, 0.9), eps=1e-7, **options
    )

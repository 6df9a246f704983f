"""What the examples train: a LLaMA of 0.1M parameters, on the bytes of a file that comes with Python."""

import inspect
import textwrap

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
    )


class Text(Dataset[dict[str, torch.Tensor]]):
    """192 sequences of 64 bytes, each its own label: the model shifts labels itself."""

    def __init__(self) -> None:
        text = torch.tensor(list(inspect.getsource(textwrap).encode()))
        self.rows = text[: 192 * 64].reshape(192, 64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}

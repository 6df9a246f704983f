"""Error of the update by quantization of the moments: power of the quantizer and block size.

A small LLaMA is trained for some steps; each of its moments in turn is quantized to one byte, the other kept exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import records
from bench.common.measure import facts
from bench.common.models import build_model, load_config
from bench.pretrain.data import ByteTokenizer, load_text
from bench.pretrain.training import loss_of
from gwt_kernels import GWTAdamW, gwt_param_groups

POWERS = (1, 2, 3, 4)
BLOCK_SIZES = (64, 128, 256)
LARGEST = {"exp_avg": 127, "exp_avg_sq": 255}
EPS = 1e-6


def moments(level: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return first and second moments of the transformed matrices of the `cpu` preset's model, after some steps."""
    model = build_model(load_config("llama_cpu"), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    corpus = load_text(None, ByteTokenizer(), heldout_fraction=0.05, seed=0, context=128, eval_windows=8)
    optimizer = GWTAdamW(gwt_param_groups(model, level=level, scale=0.1), lr=0.01)
    for _ in range(steps):
        loss_of(model, corpus.train.take(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if group["level"]]
    whole = [state["exp_avg"].numel() // max(BLOCK_SIZES) * max(BLOCK_SIZES) for state in chosen]
    m, v = (
        torch.cat([state[key].flatten()[:n] for state, n in zip(chosen, whole, strict=True)])
        for key in ("exp_avg", "exp_avg_sq")
    )
    return m, v


def quantized(x: Tensor, power: int, block_size: int, largest: int, *, keep_above_zero: bool) -> Tensor:
    """Quantize `x` stochastically to values `sign * (c / largest)**power` of each block's maximum, and dequantize
    it.
    """
    blocks = x.view(-1, block_size)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    z = blocks.abs() / scale
    low = (z ** (1 / power) * largest).floor().clamp(max=largest - 1)
    below, above = (low / largest) ** power, ((low + 1) / largest) ** power
    value = low + (torch.rand_like(z) < (z - below) / (above - below))
    value = torch.where(z > 0, value.clamp(min=1 if keep_above_zero else 0), 0.0)
    return ((value / largest) ** power * scale * blocks.sign()).flatten()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every combination, print a table, and add the rows to the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.int8", description=__doc__)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the raw JSON")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    about = facts(torch.device("cpu"), "bench.studies.int8", arguments)
    m, v = moments(options.level, options.steps)
    torch.manual_seed(0)
    exact = m / (v.sqrt() + EPS)
    rows: list[dict[str, Any]] = []
    for power in POWERS:
        for block_size in BLOCK_SIZES:
            first = quantized(m, power, block_size, LARGEST["exp_avg"], keep_above_zero=False) / (v.sqrt() + EPS)
            second = m / (quantized(v, power, block_size, LARGEST["exp_avg_sq"], keep_above_zero=True).sqrt() + EPS)
            for name, update in (("exp_avg", first), ("exp_avg_sq", second)):
                error = float((update - exact).norm() / exact.norm())
                print(f"{name}, power {power}, block size {block_size}: {100 * error:.1f} % of the update")
                head = {"moment": name, "power": power, "quantum": block_size, "level": options.level}
                value = {"metric": "update_error", "unit": "1", "median": error, "p20": error, "p80": error}
                rows.append(head | value | {"samples": 1, "note": "", "steps": options.steps} | about)
    records.append(records.new_path("codes", about, options.out), "codes", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

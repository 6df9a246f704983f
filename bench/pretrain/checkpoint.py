"""Checkpoints of tensors, numbers and strings only, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` with `torch.save`; after a crash `path` holds the complete old or the complete new file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, accepting only tensors and plain data."""
    payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return payload


def check_same_run(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a run under different settings.

    Raises:
        ValueError: Settings differ; the message names each, with both values.
    """
    differing = [
        f"{key}={saved.get(key)!r} there, {asked.get(key)!r} here"
        for key in sorted(saved.keys() | asked.keys())
        if saved.get(key) != asked.get(key)
    ]
    if differing:
        raise ValueError(
            f"cannot resume from {path}: {'; '.join(differing)}. "
            "Ask for the same settings, or start a new run in another --out"
        )

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


def write_text(path: Path, text: str) -> None:
    """Write text; after a crash `path` holds the complete old or the complete new file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, accepting only tensors and plain data.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        payload: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: what torch.load raises depends on the first wrong byte
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): restore it, or start a new run in another --out"
        ) from error
    return payload if isinstance(payload, dict) else {}


def check_same_run(path: Path, saved: dict[str, Any] | None, asked: dict[str, Any]) -> None:
    """Refuse to continue a run under different settings.

    Raises:
        ValueError: Settings differ, which the message names with both values; or the file has none.
    """
    if saved is None:
        raise ValueError(f"{path} is no checkpoint of a run: start a new one in another --out")
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

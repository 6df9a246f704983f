"""Checkpoints written by several processes together, made valid by one rename, and verified when read."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from bench.pretrain import checkpoint
from bench.pretrain.checkpoint import write_text
from bench.pretrain.parallel import Processes

_LATEST = "latest"  # the file that names the last complete checkpoint; replacing it commits a checkpoint
_MANIFEST, _ABOUT = "manifest.json", "run.pt"
_PARTIAL = ".partial"


def exists(folder: Path) -> bool:
    """Return whether there is a checkpoint to resume from."""
    return (folder / _LATEST).is_file()


def save(folder: Path, state: dict[str, Any], about: dict[str, Any], step: int, processes: Processes) -> None:
    """Write a checkpoint; after a crash `folder` holds the complete previous or the complete new one.

    Args:
        folder: Folder of the checkpoints, shared by all processes. The last two are kept.
        state: Tensors, sharded ones as DTensors; every process passes its own.
        about: Further data of the run, equal on every process.
        step: Step in the checkpoint's name.
        processes: The processes of the run; all of them have to call this.

    Raises:
        ValueError: A process could not write, raised on all; the last checkpoint is unchanged.
    """
    name = processes.on_first(lambda: _begin(folder, f"step-{step:08d}-{secrets.token_hex(3)}"))
    partial = folder / (name + _PARTIAL)
    try:
        dcp.save(state, checkpoint_id=partial)  # which syncs every file to disk
    except dcp.api.CheckpointException as error:
        raise ValueError(f"cannot write a checkpoint to {partial}: {error}") from error
    own = f"__{processes.rank}_*.distcp"
    sums = processes.agree(lambda: {file.name: _checksum(file) for file in partial.glob(own)})
    written = {file: value for part in sums for file, value in part.items()}
    processes.on_first(lambda: _commit(folder, name, written, about))


def _begin(folder: Path, name: str) -> str:
    (folder / (name + _PARTIAL)).mkdir(parents=True)
    return name


def _commit(folder: Path, name: str, sums: dict[str, int], about: dict[str, Any]) -> None:
    partial = folder / (name + _PARTIAL)
    checkpoint.write_atomically(partial / _ABOUT, about)
    sums = {**sums, **{file: _checksum(partial / file) for file in (".metadata", _ABOUT)}}
    missing = [file for file in sums if not (partial / file).is_file()]
    if missing:
        raise ValueError(f"{partial}: {missing} cannot be seen from the first process; --out has to be shared")
    write_text(partial / _MANIFEST, json.dumps(sums, indent=2))
    _sync(partial)
    os.rename(partial, folder / name)
    _sync(folder)
    before = (folder / _LATEST).read_text() if exists(folder) else None
    write_text(folder / _LATEST, name)
    _sync(folder)
    for other in folder.iterdir():
        if other.is_dir() and other.name not in (name, before):
            shutil.rmtree(other)


def read_about(folder: Path, processes: Processes) -> tuple[Path, dict[str, Any]]:
    """Return the `about` that was saved with the last checkpoint, after verifying the checksum of each file.

    Raises:
        ValueError: A file is missing or damaged; raised on every process.
    """
    path = folder / processes.on_first(lambda: (folder / _LATEST).read_text())
    sums = processes.on_first(lambda: _read_manifest(path, folder))

    def check() -> None:
        for file in sorted(sums)[processes.rank :: processes.world]:
            if not (path / file).is_file():
                raise ValueError(f"{path / file} is missing{_remedy(path, folder)}")
            if _checksum(path / file) != sums[file]:
                raise ValueError(f"{path / file} is damaged{_remedy(path, folder)}")

    processes.agree(check)
    return path, processes.agree(lambda: checkpoint.read(path / _ABOUT))[processes.rank]


def _read_manifest(path: Path, folder: Path) -> dict[str, int]:
    try:
        sums: dict[str, int] = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / _MANIFEST} is missing or damaged{_remedy(path, folder)}") from error
    return sums


def _remedy(path: Path, folder: Path) -> str:
    others = sorted(x.name for x in folder.iterdir() if x.is_dir() and x != path and x.suffix != _PARTIAL)
    back = f", or write {others[-1]} into {folder / _LATEST} to go back to it" if others else ""
    return f": restore it{back}, or start a new run in another --out"


def read_state(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint's tensors, sharded like those of `like`, which are left unchanged.

    Raises:
        ValueError: The tensors do not fit this model and optimizer; raised on every process.
    """
    state = copy.deepcopy(like)
    try:
        dcp.load(state, checkpoint_id=path)
    except dcp.api.CheckpointException as error:
        reasons = sorted({str(why[0]) for why in error.failures.values()})
        raise ValueError(f"cannot resume from {path}: {'; '.join(reasons)}") from error
    dist.barrier()
    return state


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def _sync(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

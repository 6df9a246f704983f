"""Checks of output folders and records, made before hours are spent on a run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

ROOM = 10_000_000
"""Free bytes that a run needs to start; records take less."""


def check_out(out: Path) -> None:
    """Check that a folder for results can be written to, and make it.

    Raises:
        ValueError: The folder cannot be made or written to, or its disk has too little room.
    """
    _check_folder(out, f"--out {out}", "give another folder")


def check_record(record: Path) -> None:
    """Check that a record can be written, and make its folder.

    Raises:
        ValueError: It is a folder, its folder cannot be written to, or the disk has too little room.
    """
    if record.is_dir():
        raise ValueError(f"--record {record}: is a folder; name a file in it")
    _check_folder(record.parent, f"--record {record}", "give another file")


def _check_folder(folder: Path, option: str, remedy: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot be written ({error.strerror}); {remedy}") from error
    _check_room(folder, option)


def _check_room(folder: Path, option: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise ValueError(
            f"{option}: {free / 1e6:.1f} MB are free and results take up to {ROOM / 1e6:.0f} MB; make room"
        )

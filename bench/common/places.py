"""Checks of output folders and records, made before hours are spent on a run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

ROOM = 10_000_000
"""Free bytes that a run needs to start; records take less."""


def check_out(out: Path) -> None:
    """Make a folder for results, and check that its disk has room.

    Raises:
        ValueError: The folder cannot be made, or the disk has too little room.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be made ({error.strerror}); give another folder") from error
    _check_room(out, f"--out {out}")


def check_record(record: Path) -> None:
    """Check that a record can be written, and make its folder.

    Raises:
        ValueError: It is a folder, its folder cannot be written to, or the disk has too little room.
    """
    if record.is_dir():
        raise ValueError(f"--record {record}: is a folder; name a file in it")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=record.parent):
            pass
    except OSError as error:
        raise ValueError(f"--record {record}: cannot be written ({error.strerror}); give another file") from error
    _check_room(record.parent, f"--record {record}")


def _check_room(folder: Path, option: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise ValueError(
            f"{option}: {free / 1e6:.1f} MB are free and results take up to {ROOM / 1e6:.0f} MB; make room"
        )

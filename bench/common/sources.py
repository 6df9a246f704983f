"""A digest of the source files behind a measured step, to tell whether they have changed since a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "gwt_kernels"
_STATEMENTS = ("rules/*.py", "formats/*.py")
_OF_BACKENDS = {
    "compiled": ("backends/cpu/*.c", "backends/cpu/*.h", "backends/cpu/*.inc"),
    "triton": ("backends/triton/*.py", *_STATEMENTS),
    "torch": ("backends/torch/*.py", *_STATEMENTS),
}


def digest(backend: str) -> str:
    """Return a digest of the source files that make up a backend's step.

    Raises:
        FileNotFoundError: a listed file does not exist, for instance after it was moved.
    """
    kinds = _OF_BACKENDS[backend]
    paths = [path for kind in kinds for path in sorted(PACKAGE.glob(kind))]
    if not paths:
        raise FileNotFoundError(f"no {' or '.join(kinds)} in {PACKAGE}: say in {__file__} where they are")
    parts = (part for path in paths for part in (path.name.encode(), path.read_bytes()))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

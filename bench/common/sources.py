"""What a measured step is made of, as one digest: so a run is known whose sources have changed since."""

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
    """Return a digest of the files that a backend's step is made of.

    Raises:
        FileNotFoundError: there are none, as after a move that this module has not followed.
    """
    kinds = _OF_BACKENDS[backend]
    paths = [path for kind in kinds for path in sorted(PACKAGE.glob(kind))]
    if not paths:
        raise FileNotFoundError(f"no {' or '.join(kinds)} in {PACKAGE}: say in {__file__} where they are")
    parts = (part for path in paths for part in (path.name.encode(), path.read_bytes()))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

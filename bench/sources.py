"""What a measured step is made of, as one digest: so a run is known whose sources have changed since."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "gwt_kernels"
_OF_BACKENDS = {
    "compiled": ("compiled_backend", ("*.c", "*.h", "*.inc")),
    "triton": ("triton_backend", ("*.py",)),
    "torch": ("torch_backend", ("*.py",)),
}


def digest(backend: str) -> str:
    """Return a digest of the files that a backend's step is made of.

    Raises:
        FileNotFoundError: there are none, as after a move that this module has not followed.
    """
    folder, kinds = _OF_BACKENDS[backend]
    paths = sorted(path for kind in kinds for path in (PACKAGE / folder).glob(kind))
    if not paths:
        raise FileNotFoundError(f"no {' or '.join(kinds)} in {PACKAGE / folder}: say in {__file__} where they are")
    parts = (part for path in paths for part in (path.name.encode(), path.read_bytes()))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

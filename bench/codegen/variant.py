"""One kernel variant: the properties of a launch that decide which machine code runs."""

from __future__ import annotations

from typing import NamedTuple

from gwt_kernels.core.level import Level

__all__ = ["Variant"]


class Variant(NamedTuple):
    """One compiled kernel; an option that it does not depend on is None."""

    target: str
    kernel: str
    weights: str | None = None
    moments: str | None = None
    level: Level | None = None
    path: str | None = None
    limited: bool | None = None
    rule: str | None = None
    rounding: str | None = None

    def __str__(self) -> str:
        words = [self.kernel, self.target]
        words += [f"{k} {v}" for k, v in self._asdict().items() if k not in ("kernel", "target") and v is not None]
        return ", ".join(words)

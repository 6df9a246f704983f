"""Find optimizers with telemetry and name their scalars, for the callbacks of all frameworks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class HasTelemetry(Protocol):
    """An optimizer with a ``telemetry()`` method."""

    def telemetry(self) -> Mapping[str, Mapping[str, float]]:
        """Return measurements by parameter name; empty if telemetry is off."""


def with_telemetry(optimizers: Iterable[Any]) -> list[HasTelemetry]:
    """Return the optimizers that have telemetry, unwrapped from Accelerate and Lightning.

    Raises:
        TypeError: no optimizer has telemetry.
    """
    bare = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
    found = [optimizer for optimizer in bare if callable(getattr(optimizer, "telemetry", None))]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in bare) or "no optimizer"
        raise TypeError(f"TelemetryCallback logs what GWTAdamW(..., telemetry=True) measures, but found {kinds}")
    return found


def scalars(optimizers: Iterable[HasTelemetry]) -> dict[str, float]:
    """Return the measurements of the last step, named ``telemetry/<what>/<parameter>``.

    If optimizers share parameter names, those of later optimizers end in the optimizer's number.

    Raises:
        ValueError: telemetry is off in every optimizer.
    """
    named: dict[str, float] = {}
    for i, optimizer in enumerate(optimizers):
        for parameter, measured in optimizer.telemetry().items():
            for what, value in measured.items():
                name = f"telemetry/{what}/{parameter}"
                named[f"{name}/optimizer_{i}" if name in named else name] = value
    if not named:
        raise ValueError("telemetry is off in the optimizer, so there is nothing to log: pass telemetry=True to it")
    return named


def check_every(every: int) -> int:
    """Return the number of steps between two logs, or raise.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}: the steps between two logs")
    return every


def missing(module: str, needs: str, install: str) -> ModuleNotFoundError:
    """Return the error of an integration whose library is not installed."""
    return ModuleNotFoundError(f"{module} needs {needs}: pip install {install}", name=needs)

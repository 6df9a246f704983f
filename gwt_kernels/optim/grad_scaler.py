"""``found_inf``, the attribute through which ``torch.amp.GradScaler`` makes an optimizer skip a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

_WATCHES_CALLS = "accelerate.optimizer"
"""Module whose optimizer wrapper regards a step as taken exactly if ``optimizer.step`` was called."""


class FoundInf:
    """``optimizer.found_inf``: set by a scaler before it calls ``step()``; above 0 to skip the step.

    The step is skipped on the device, and the host does not wait. Only Accelerate's ``AcceleratedOptimizer`` needs
    to know before schedules advance: it replaces ``optimizer.step`` to detect whether it is called. A step that
    will be skipped therefore bypasses the replacement. For that the host waits for the device, as it does under
    Accelerate for every optimizer.
    """

    def __get__(self, optimizer: Optimizer | None, owner: type | None = None) -> Tensor:
        try:
            return vars(optimizer)["found_inf"]  # type: ignore[no-any-return]
        except (KeyError, TypeError):  # no scaler is stepping, or accessed on the class
            raise AttributeError("found_inf is there while a GradScaler steps the optimizer") from None

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        attributes = vars(optimizer)
        attributes["found_inf"] = value
        if getattr(attributes.get("step"), "__module__", None) == _WATCHES_CALLS and float(value) > 0:
            del attributes["step"]  # Accelerate restores it itself

    def __delete__(self, optimizer: Optimizer) -> None:
        self.__get__(optimizer)  # raises if there is none
        del vars(optimizer)["found_inf"]

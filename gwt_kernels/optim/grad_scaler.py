"""The attribute through which a ``torch.amp.GradScaler`` tells the optimizer to skip, and who else has to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["FoundInf"]

_WATCHES_CALLS = "accelerate.optimizer"
"""The module whose wrapper takes a step that is called for one that was taken, and any other for a skipped one."""


class FoundInf:
    """``optimizer.found_inf``: set by a scaler before it calls ``step()``, above 0 where the step is to be skipped.

    The step is skipped on the device, and nothing waits to learn of it. Accelerate's ``AcceleratedOptimizer`` alone
    has to know before schedules advance. It watches whether ``optimizer.step``, which it replaces for that time, is
    called, so a step that will be skipped is called past its watch. To know, the host waits for the device, as it
    does under Accelerate for every optimizer.
    """

    def __get__(self, optimizer: Optimizer | None, owner: type | None = None) -> Tensor:
        try:
            return vars(optimizer)["found_inf"]  # type: ignore[no-any-return]
        except (KeyError, TypeError):  # no scaler steps just now; asked of the class
            raise AttributeError("found_inf is there while a GradScaler steps the optimizer") from None

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        own = vars(optimizer)
        own["found_inf"] = value
        if getattr(own.get("step"), "__module__", None) == _WATCHES_CALLS and float(value) > 0:
            del own["step"]  # Accelerate puts it back itself

    def __delete__(self, optimizer: Optimizer) -> None:
        self.__get__(optimizer)  # raises where there is none
        del vars(optimizer)["found_inf"]

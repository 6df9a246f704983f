"""Base class of optimizers for what they save: state dicts and pickles that keep dtypes and bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from gwt_kernels.optim.loading import check_and_set_aside, check_places, complete_saved
from gwt_kernels.optim.numbers import plain
from gwt_kernels.optim.options import ADDED
from gwt_kernels.optim.state import upgraded

_NO_CONTROL = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "capturable": False,
    "_observed": False,
    "_skipped": None,
}  # attributes that older pickles lack
_KEPT = ("defaults", "state", "param_groups", "_limiter_is_published", "_adamw", "_rows", *_NO_CONTROL)


class SavedOptimizer(Optimizer):
    """An optimizer whose state dicts and pickles another process, and a later version, can load.

    A subclass has the attributes in ``_KEPT``, which pickles hold. In ``__setstate__``, which loading calls too, it
    renews what it derives from groups and states.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as ``torch.optim.Optimizer`` does, with NumPy scalars in options as Python numbers.

        ``torch.load(..., weights_only=True)`` refuses NumPy scalars. If an option was turned on since a parameter's
        last step, the state has the entries that its next step would add.

        Raises:
            ValueError: there is a state of a parameter that is no longer in a group.
        """
        # Registered first, so that the user's own hooks see what it makes of the state.
        handle = self.register_state_dict_post_hook(complete_saved, prepend=True)
        try:
            found = super().state_dict()
        except KeyError as error:  # the base class names a parameter by its id only
            check_places(self.state, self.param_groups)
            raise error
        finally:
            handle.remove()
        for group in found.get("param_groups", ()):  # a user's hook may remove the groups
            group.update({name: plain(value) for name, value in group.items() if name != "params"})
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned: same dtypes, same bits, copied.

        Differs from ``torch.optim.Optimizer`` where that would lose information: moments keep their dtype
        instead of taking the parameter's, tensors are copied instead of shared, and a state whose level,
        rule, wavelet, boundary, dtype, shapes or bias correction do not fit these parameters is refused
        before anything changes.
        A group's options are taken from the state, except ``backend``, which depends on the machine.

        Raises:
            ValueError: the state does not fit; the message names the group or the parameter.
            TypeError: an option in the state has the wrong type.
        """
        # Registered last, so that it checks the state after the user's own hooks have changed it.
        handle = self.register_load_state_dict_pre_hook(check_and_set_aside)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_set_aside", None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in _NO_CONTROL.items():
            self.__dict__.setdefault(name, value)
        for name in ("_rows", "_adamw"):
            self.__dict__.setdefault(name, {})
        for key, value in self.__dict__.pop("_set_aside", {}).items():
            self.state[key] = value
        for p, held in self.state.items():
            self.state[p] = upgraded(held, p if isinstance(p, Tensor) else None)
        self.defaults.pop("differentiable", None)  # the base class puts it there, and groups would inherit it
        for options in (self.defaults, *self.param_groups):
            options.update(ADDED | options)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

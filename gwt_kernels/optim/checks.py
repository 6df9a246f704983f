"""Checks of a parameter and its gradient before they are stepped: each error names the parameter and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gwt_kernels.backends import choice
from gwt_kernels.backends.step_decision import ClipRequest
from gwt_kernels.core.dtensor import any_sharded, is_sharded
from gwt_kernels.core.hyper import literal_alone
from gwt_kernels.core.level import ROW
from gwt_kernels.distributed.sharding import ROWS_STAY
from gwt_kernels.haar.transform import check_level
from gwt_kernels.optim.options import rounding_of
from gwt_kernels.optim.state import (
    check_memory,
    check_place,
    check_shards,
    check_state,
    head_rows_of,
    moment_format,
    state_keys,
    upgraded,
)

_ADDED = ("limiter_norm", "weight_low")  # a state may lack these if their option was turned on in mid-run


def name_of(group: Mapping[str, Any], index: int, group_index: int) -> str:
    """Return the description of a parameter in errors: its name, or position if the group has none, and shape."""
    p = group["params"][index]
    return label_of(group, index, group_index) + ("" if is_lazy(p) else f" of shape {tuple(p.shape)}")


def label_of(group: Mapping[str, Any], index: int, group_index: int) -> str:
    """Return :func:`name_of` without the shape."""
    names = names_of(group)
    return f"parameter {repr(names[index]) if names else f'{index} of group {group_index}'}"


def names_of(group: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the names of a group's parameters; None if it has none.

    ``ZeroRedundancyOptimizer`` passes some of a group's parameters with the names of all, which are ignored.
    """
    names = group.get("param_names")
    return names if names and len(names) == len(group["params"]) else None


def check_initialized(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if a parameter has no shape yet, as a lazy module's before its first forward pass."""
    for name, p in named:
        if is_lazy(p):
            raise RuntimeError(
                f"{name} is uninitialized, as a lazy module's parameters are before its first forward pass, and "
                f"has no shape yet: run one forward pass of the model first"
            )


def check_param(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    check_initialized([(name, p)])
    if not p.is_floating_point():
        raise TypeError(
            f"{name} is {p.dtype}: only real floating-point tensors are updated; leave it out of the optimizer"
        )
    if p.dtype.itemsize < 2:
        raise TypeError(
            f"{name} is {p.dtype}, in which PyTorch does not compute: give the optimizer weights in torch.bfloat16 "
            f"or wider, and convert these after each step"
        )
    if p.layout != torch.strided:
        raise TypeError(f"{name} has layout {p.layout}: only dense tensors are updated; call to_dense() on it")
    if any(stride == 0 and n > 1 for stride, n in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name} has strides {p.stride()}, so elements share memory: clone() it")
    if p.numel() and group["level"] != ROW:
        check_level(group["level"], p.shape[-1] if p.dim() else 1, name)
    check_heads_of(p, group, name)
    check_rounding_of(p, group, name)
    check_shards(p, group, name)
    if p.device.type != "meta":
        check_backend(p, name, p.dtype, group)


def check_heads_of(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless the rows of a parameter are whole heads."""
    head_rows, rows = head_rows_of(group), p.shape[-2] if p.dim() > 1 else 0
    if head_rows is not None and rows % head_rows:
        raise ValueError(
            f"{name} has {rows} rows, which head_rows={head_rows} does not divide: give it a group with a divisor "
            f"of {rows}, such as 1 for a second moment a row, or exclude it from the transform"
        )


def check_rounding_of(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    try:
        rounding_of(p, group["weight_rounding"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_grad(g: Tensor, p: Tensor, name: str) -> None:
    if g.layout != torch.strided:
        raise RuntimeError(
            f"this optimizer does not support sparse gradients, got {g.layout} for {name}: use sparse=False in its "
            f"embedding, or give it to torch.optim.SparseAdam"
        )
    if not g.is_floating_point():
        raise RuntimeError(f"the gradient of {name} is {g.dtype}: it has to be a real floating-point one")
    if g.shape != p.shape or g.device != p.device:
        raise RuntimeError(
            f"{name} is on {p.device}, its gradient of shape {tuple(g.shape)} on {g.device}: the parameter changed "
            f"since backward, which has to run again"
        )


def check_backend(p: Tensor, name: str, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> None:
    """Raise if the requested backend cannot take the parameter, its gradient or its moments."""
    moments = moment_format(p, group).arithmetic
    for what, dtype in (("dtype", p.dtype), ("gradient", grad_dtype), ("state_dtype", moments)):
        try:
            choice.resolve_update(
                group["backend"], p.device, dtype, group["level"], group["wavelet"], group["boundary"]
            )
        except RuntimeError as error:
            raise RuntimeError(f"{name} ({what} {dtype}): {error}") from None


def check_before_step(p: Tensor, state: Mapping[str, Any] | None, group: Mapping[str, Any], name: str) -> None:
    """Raise unless a parameter, its gradient (not None) and its state, if any, fit together."""
    assert p.grad is not None
    check_param(p, group, name)
    check_grad(p.grad, p, name)
    check_backend(p, name, p.grad.dtype, group)
    check_memory(p, name)
    check_memory(p.grad, f"the gradient of {name}")
    if state:
        state = upgraded(state, p)
        check_state(state, p, group, name, [key for key in state_keys(p, group) if key not in _ADDED])
        check_place(state, p, name)


def check_replaced(
    group: Mapping[str, Any], before: Sequence[Mapping[Tensor, torch.Size]], group_index: int
) -> None:
    """Raise if a flat buffer, which keeps no rows, has replaced parameters, as under ZeRO.

    A DTensor keeps its rows. A tensor as long as a former parameter of the group, or in the place of a
    one-dimensional one, counts as another model's. A former parameter itself is no buffer, in whichever group.

    Args:
        group: Group whose parameters may have been replaced.
        before: Shape by parameter of each group, at the last check.
        group_index: Index of the group, for the message.

    Raises:
        TypeError: a parameter is such a buffer.
    """
    if not group["level"]:
        return
    params, shapes = group["params"], list(before[group_index].values()) if group_index < len(before) else []
    for k, p in enumerate(params):
        if p.dim() != 1 or p.shape in shapes or is_sharded(p) or any(each.get(p) == p.shape for each in before):
            continue
        replaced = shapes[k] if k < len(shapes) else ()
        if len(params) < len(shapes) or len(replaced) > 1:
            raise TypeError(
                f"{name_of(group, k, group_index)} was put in the place of others since the optimizer was made, as "
                f"ZeRO does with flat buffers, in which no rows are left: {ROWS_STAY}, or give its group level 0"
            )


def check_observable(group: Mapping[str, Any]) -> None:
    """Raise unless telemetry supports the group's options and parameters."""
    if unknown := literal_alone(group["wavelet"], group["boundary"]):
        raise ValueError(
            f"telemetry=True knows no {unknown}: turn it off, or use wavelet='haar' and boundary='zero'"
        )
    if any_sharded(group["params"]):
        raise ValueError("telemetry=True knows no sharded parameters: turn it off")


def check_capturable(p: Tensor, group: Mapping[str, Any], name: str) -> None:
    """Raise unless a CUDA graph can capture the parameter's step."""
    if p.device.type != "cuda":
        return
    kind = (p.device, p.dtype, group["level"], group["wavelet"], group["boundary"])
    if choice.resolve(group["backend"], *kind) == "torch":
        raise RuntimeError(
            f"{name}: capturable=True needs the Triton backend, as the torch backend's launches depend on the "
            f"host's numbers, but {choice.triton_obstacle(*kind) or 'backend=' + repr(group['backend'])}"
        )
    if isinstance(group["lr"], Tensor) and group["lr"].device not in (p.device, torch.device("cpu")):
        raise RuntimeError(f"{name} is on {p.device}, its lr on {group['lr'].device}: put both on one device")


def check_traceable(asked: ClipRequest) -> None:
    """Raise if a graph is being traced of a step that may have to be skipped."""
    if choice.is_graph() and (asked.skip_nonfinite or asked.found_inf is not None):
        raise RuntimeError(
            f"step() is being traced by {choice.tracer()}, and a graph cannot skip a step: take "
            f"skip_nonfinite=True or the GradScaler away while tracing"
        )


def check_captured_everywhere(devices: Iterable[torch.device], capturing: bool) -> None:
    """Raise if a CUDA graph captures the step on some of its devices only.

    Args:
        devices: Devices of the parameters.
        capturing: Whether the current device's current stream is being captured.

    Raises:
        RuntimeError: another device's current stream is captured where this one's is not, or the other way round.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    here = torch.cuda.current_device()
    for device in devices:
        if device.type != "cuda" or device.index == here:
            continue
        with torch.cuda.device(device):
            there = torch.cuda.is_current_stream_capturing()
        if there != capturing:
            captured, other = (f"cuda:{here}", device) if capturing else (device, f"cuda:{here}")
            raise RuntimeError(
                f"step() is being captured in a CUDA graph on {captured} but not on {other}, whose part a replay "
                "would leave out: make streams of the capture the current ones of both devices, or give the "
                "parameters of each an optimizer of their own"
            )


def is_captured(capturable: bool) -> bool:
    """Return whether a CUDA graph captures the step.

    Raises:
        RuntimeError: it does, and the optimizer is not ``capturable``.
    """
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
    if capturing and not capturable:
        raise RuntimeError(
            "step() is being captured in a CUDA graph, but step counts and learning rates are the "
            "host's, and a replay would repeat those of the capture: build the optimizer with capturable=True"
        )
    return capturing

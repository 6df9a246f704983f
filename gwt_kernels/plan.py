"""What a model costs under ``GWTAdamW``, before a byte is allocated: states, bytes moved, time per step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gwt_kernels.checks import check_initialized, name_of
from gwt_kernels.hyper import Rule
from gwt_kernels.model_files import build_on_meta
from gwt_kernels.optimizer import GWTAdamW
from gwt_kernels.options import state_dtype_name, state_dtype_of
from gwt_kernels.param_groups import Decision, decide
from gwt_kernels.state import MOMENTS, SCALES, complete

__all__ = [
    "Cost",
    "Entry",
    "Plan",
    "adamw_state",
    "bytes_of",
    "limiter_bytes",
    "measure_bandwidth",
    "parse_bandwidth",
    "pass_bytes",
    "plan",
    "predicted_state_bytes",
]

LEVELS = (0, 1, 2, 3, 4)
INT8_MOMENTS = ("state_dtype", torch.int8)
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Entry(NamedTuple):
    """One trainable parameter: what it gets and why, and what that costs. Tied weights are one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    level: int
    """Levels of the wavelet transform; 0 means plain AdamW."""
    decayed: bool
    reason: str
    weight_bytes: int
    state_bytes: int
    """Moments and scalars (``step``, ``limiter_norm``) of `GWTAdamW`."""
    moved_bytes: int
    """Bytes that one step must read and write."""


class Cost(NamedTuple):
    """What one setting of an optimizer keeps, and what each of its steps moves."""

    optimizer: str
    """``"AdamW"`` or ``"GWTAdamW"``."""
    level: int | None
    """None for ``torch.optim.AdamW``."""
    moments: str
    """dtype of the moments."""
    state_bytes: int
    moved_bytes: int
    """Per step: gradients read once, weights and moments read and written, and the limiter's part."""
    limiter_bytes: int
    """The part of ``moved_bytes`` that is the limiter's second read of gradients and moments."""
    offered: bool
    """Whether the optimizer can keep moments of this dtype; otherwise the row says what they would cost."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes throughout; ``str()`` is the text that ``gwt-kernels plan`` prints."""

    model: str
    """Class of the model."""
    source: str
    """Preset or path it was built from; ``"a live module"`` otherwise."""
    entries: tuple[Entry, ...]
    """The trainable parameters, in the model's order."""
    frozen: Mapping[str, Tensor] = field(repr=False, compare=False)
    """Weights without ``requires_grad``, as tensors on the meta device: they have neither gradient nor state."""
    states: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]] = field(repr=False, compare=False)
    """Each trainable parameter and its state, as tensors that take no memory, with the options asked for."""
    tensor_parallel: Mapping[str, str]
    """How the model's own plan divides its layers, by name with ``*`` for a number; empty where it has none."""
    chosen: Cost
    """`GWTAdamW` with the options asked for."""
    adamw: tuple[Cost, ...]
    """``torch.optim.AdamW``: moments in the weights' dtype, and in float32."""
    options: tuple[Cost, ...]
    """`GWTAdamW` by level and dtype of the moments, without levels that an included tensor is too narrow for."""
    too_narrow: tuple[str, ...]
    """Tensors that the recipe transforms, but which stay at level 0 since their rows are too short."""
    float32_moments: tuple[str, ...]
    """With int8 moments: tensors too small, or at too deep a level, whose moments stay float32."""
    bandwidth: float | None
    """Bytes per second."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, frozen ones among them."""
        return self.gradient_bytes + self.frozen_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients, in the weights' dtypes."""
        return sum(entry.weight_bytes for entry in self.entries)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the weights that do not train."""
        return bytes_of(*self.frozen.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state with the options asked for."""
        return self.chosen.state_bytes

    def seconds(self, cost: Cost) -> float | None:
        """The time in which memory of the plan's bandwidth moves a step's bytes; None without a bandwidth."""
        return None if self.bandwidth is None else cost.moved_bytes / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts, for JSON."""

        def cost(c: Cost) -> dict[str, Any]:
            return {**c._asdict(), "seconds": self.seconds(c)}

        return {
            "model": self.model,
            "source": self.source,
            "weight_bytes": self.weight_bytes,
            "gradient_bytes": self.gradient_bytes,
            "frozen_bytes": self.frozen_bytes,
            "state_bytes": self.state_bytes,
            "bandwidth": self.bandwidth,
            "chosen": cost(self.chosen),
            "adamw": [cost(c) for c in self.adamw],
            "options": [cost(c) for c in self.options],
            "too_narrow": list(self.too_narrow),
            "float32_moments": list(self.float32_moments),
            "parameters": [
                {**entry._asdict(), "shape": list(entry.shape), "dtype": _name(entry.dtype)}
                for entry in self.entries
            ],
        }

    def __str__(self) -> str:
        from gwt_kernels.plan_text import render

        return render(self)


def plan(
    model: nn.Module | str | Path,
    *,
    level: int = 2,
    state_dtype: torch.dtype | None = None,
    rule: Rule = "gwt",
    norm_growth_limit: float | Literal["published"] | None = "published",
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
    dtype: torch.dtype | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """Work out what `GWTAdamW` over the groups of `gwt_param_groups` will hold and move; nothing is allocated.

    States are the optimizer's own, made on the meta device, so the numbers are those of the state after a first
    step, byte for byte (on one process; `gwt_kernels.plan_sharded` divides them). Bytes moved are those of the
    fused pass: per parameter, gradients read, weights and moments read and written, all once, and with the limiter
    gradients and moments read once more (docs/algorithm.md, "One pass"). Buffers and activations are not counted.

    Args:
        model: A preset's name (``"llama_1b"``), the path of a Hugging Face ``config.json`` or of its folder, or a
            module on any device.
        level: As for `gwt_param_groups`.
        include: As for `gwt_param_groups`.
        exclude: As for `gwt_param_groups`.
        state_dtype: dtype of the moments; None for `GWTAdamW`'s default. A dtype that the optimizer does not take
            is computed all the same, and marked as not offered.
        rule: As for `GWTAdamW`.
        norm_growth_limit: As for `GWTAdamW`; None for no limiter.
        dtype: dtype of weights and gradients. None: a module's own; a configuration's, and bfloat16 where it
            names none.
        bandwidth: Bytes per second that memory moves, such as :func:`measure_bandwidth` returns.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as :func:`gwt_kernels.model_files.build_on_meta`.
        TypeError: the model is none of these, or a parameter or an option has a type that the optimizer refuses.
        ValueError: the file is no model's, or an option is out of range.
        RuntimeError: a parameter of a lazy module has no shape before the first forward pass.
    """
    for option, value in (("dtype", dtype), ("state_dtype", state_dtype)):
        fits = isinstance(value, torch.dtype) and (value.is_floating_point or (option, value) == INT8_MOMENTS)
        if value is not None and not fits:
            raise TypeError(f"{option} must be a floating-point torch.dtype or None, got {value!r}")
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be a finite number of bytes per second above 0, got {bandwidth}")
    if not isinstance(model, nn.Module | str | Path):
        raise TypeError(f"model must be a torch.nn.Module, a preset's name or a path, got {type(model).__name__}")
    source = "a live module" if isinstance(model, nn.Module) else str(model)
    module = model if isinstance(model, nn.Module) else build_on_meta(model, dtype)
    check_initialized((f"parameter {name!r}", p) for name, p in module.named_parameters())

    def options_at(level: int) -> _Setting:
        decided = decide(module, level=level, include=include, exclude=exclude)
        stand_ins = [(_stand_in(p, dtype), decision) for p, decision in decided]
        return _Setting(stand_ins, level, rule=rule, norm_growth_limit=norm_growth_limit)

    asked = options_at(level)
    settings = {level: asked}
    for other in LEVELS:
        if other not in settings:
            # The options are fine, as the level asked for has shown: all that can be refused is too short a row.
            with suppress(ValueError):
                settings[other] = options_at(other)
    chosen = asked.cost(state_dtype)
    dtypes = {_name(each): each for each in MOMENT_DTYPES} | {chosen.moments: state_dtype}
    weights = _names({p.dtype for p, _ in asked.members})
    deep = {d.name for _, d in asked.members if d.level}
    return Plan(
        model=type(module).__name__,
        source=source,
        entries=tuple(asked.entries(state_dtype)),
        frozen={name: _stand_in(p, dtype) for name, p in module.named_parameters() if not p.requires_grad},
        states={d.name: (p, state) for p, d, state in asked.states(state_dtype)},
        tensor_parallel=dict(getattr(module, "_tp_plan", None) or {}),
        chosen=chosen,
        adamw=tuple(asked.adamw(each) for each in ((None,) if weights == "float32" else (None, torch.float32))),
        options=tuple(settings[each].cost(d) for each in sorted(settings) for d in dtypes.values()),
        too_narrow=tuple(d.name for _, d in settings[1].members if d.level and d.name not in deep)
        if level and 1 in settings
        else (),
        float32_moments=tuple(
            d.name for _, d, state in asked.states(state_dtype) if state["exp_avg"].dtype == torch.float32
        )
        if state_dtype == torch.int8
        else (),
        bandwidth=bandwidth,
    )


def predicted_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of state that an optimizer holds after its first step, from shapes and options alone.

    Args:
        optimizer: `GWTAdamW` or ``torch.optim.AdamW``, over tensors on any device.
    """
    for i, group in enumerate(optimizer.param_groups):
        check_initialized((name_of(group, k, i), p) for k, p in enumerate(group["params"]))
    return sum(
        bytes_of(*_first_state(p, group).values())
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    )


def measure_bandwidth(device: torch.device | None = None, *, size: int | None = None) -> float:
    """Measure the bytes per second (read plus written) of a copy within a device's memory.

    Args:
        device: Where to copy; None for the CUDA device if there is one, and the CPU otherwise.
        size: Bytes of the buffer, far above any cache. None for 4 GiB on CUDA (less where less is free), and for
            256 MiB on a CPU.
    """
    from torch.utils.benchmark import Timer

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if size is None:
        size = min(2**32, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    timer = Timer(
        "target.copy_(source)",
        globals={"source": source, "target": torch.empty_like(source)},
        num_threads=torch.get_num_threads(),
    )
    timer.timeit(3)
    return 2 * size / timer.timeit(20).median


def parse_bandwidth(text: str) -> float:
    """Bytes per second from ``"3.35e12"``, ``"3350GB/s"`` or ``"3.35TB/s"`` (decimal units, as vendors use).

    Raises:
        ValueError: the text is none of these, or a plain number so small that its unit must have been forgotten.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:([MGT])B/s)?\s*", text)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    value *= {"M": 1e6, "G": 1e9, "T": 1e12}[found[2]] if found and found[2] else 1
    if not (math.isfinite(value) and value >= 1e6):
        raise ValueError(
            f"bandwidth {text!r} is not understood: give bytes per second, such as 3.35e12, or a number with its "
            f"unit, such as 3350GB/s or 3.35TB/s"
        )
    return value


class _Setting:
    """A model's tensors as the optimizer gets them at one level, on the meta device."""

    def __init__(self, members: list[tuple[Tensor, Decision]], level: int, **options: Any) -> None:
        self.members = members
        self.level = level
        groups = [
            {"params": [(d.name, p) for p, d in members if d.level == each], "level": each}
            for each in sorted({d.level for _, d in members})
        ]
        # The optimizer itself: it refuses what it would refuse later, and its groups hold its own defaults.
        self.optimizer = GWTAdamW(groups, **options)
        self.group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}

    def states(self, state_dtype: torch.dtype | None) -> Iterator[tuple[Tensor, Decision, dict[str, Tensor]]]:
        for p, decision in self.members:
            yield p, decision, _first_state(p, self.group_of[p], state_dtype)

    def entries(self, state_dtype: torch.dtype | None) -> Iterator[Entry]:
        for p, d, state in self.states(state_dtype):
            yield Entry(
                d.name, d.shape, p.dtype, d.level, d.decayed, d.reason,
                bytes_of(p), bytes_of(*state.values()), pass_bytes(p, state) + limiter_bytes(p, state),
            )  # fmt: skip

    def cost(self, state_dtype: torch.dtype | None) -> Cost:
        states = list(self.states(state_dtype))
        limiter = sum(limiter_bytes(p, state) for p, _, state in states)
        return Cost(
            optimizer="GWTAdamW",
            level=self.level,
            moments=_names({state_dtype_of(p, None) if state_dtype is None else state_dtype for p, _, _ in states}),
            state_bytes=sum(bytes_of(*state.values()) for _, _, state in states),
            moved_bytes=sum(pass_bytes(p, state) for p, _, state in states) + limiter,
            limiter_bytes=limiter,
            offered=_offered(state_dtype),
        )

    def adamw(self, moments: torch.dtype | None) -> Cost:
        states = [(p, adamw_state(p, moments or p.dtype)) for p, _ in self.members]
        return Cost(
            optimizer="AdamW",
            level=None,
            moments=_names({moments or p.dtype for p, _ in states}),
            state_bytes=sum(bytes_of(*state.values()) for _, state in states),
            moved_bytes=sum(pass_bytes(p, state) for p, state in states),
            limiter_bytes=0,
            offered=moments is None,
        )


def _stand_in(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like `p` that takes no memory."""
    dtype = dtype if dtype is not None and p.is_floating_point() else p.dtype
    return torch.empty(p.shape, dtype=dtype, device="meta")


def _first_state(p: Tensor, group: Mapping[str, Any], state_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state that a first step makes for `p` under a group's options, but with moments of `state_dtype`."""
    if "level" not in group:
        extra = {"max_exp_avg_sq": _stand_in(p)} if group["amsgrad"] else {}
        return adamw_state(p, p.dtype) | extra
    state: dict[str, Tensor] = {}
    offered = _offered(state_dtype)
    own = group["state_dtype"] if state_dtype is None or not offered else state_dtype_name(state_dtype)
    complete(state, _stand_in(p), {**group, "state_dtype": own})
    if not offered:
        state |= {key: state[key].to(state_dtype) for key in MOMENTS}
    return state


def adamw_state(p: Tensor, moments: torch.dtype) -> dict[str, Tensor]:
    """What ``torch.optim.AdamW`` holds for `p`: moments in the weights' dtype if nobody says otherwise."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        **{key: _stand_in(p, moments) for key in MOMENTS},
    }


def _offered(state_dtype: torch.dtype | None) -> bool:
    try:
        state_dtype_name(state_dtype)
    except ValueError:
        return False
    return True


def pass_bytes(p: Tensor, state: Mapping[str, Tensor]) -> int:
    """Bytes that a step moves of a parameter with this state: all but the limiter's second read."""
    return 3 * bytes_of(p) + 2 * _moment_bytes(state)  # a gradient, of the weights' dtype, is read and not written


def limiter_bytes(p: Tensor, state: Mapping[str, Tensor]) -> int:
    """Bytes of the limiter's second read, 0 where there is no limiter."""
    return bytes_of(p) + _moment_bytes(state) if "limiter_norm" in state else 0


def _moment_bytes(state: Mapping[str, Tensor]) -> int:
    return bytes_of(*(state[key] for key in (*MOMENTS, *SCALES) if key in state))


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of all elements of the tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(_name, dtypes)))

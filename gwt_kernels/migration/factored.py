"""Convert factored second moments: from other Adafactors, between levels, from and to Adam's moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gwt_kernels.core.factored import FACTORS, factor_dims
from gwt_kernels.migration.conversion import Form, convert, describe, form_of
from gwt_kernels.migration.records import Migrated, Source, Target, finished, form_of_options, number_in
from gwt_kernels.optim.state import complete, slots_of, state_shape
from gwt_kernels.rules import ADAFACTOR, rule_of

_TORCH = {"row_var": FACTORS[0], "col_var": FACTORS[1], "variance": "exp_avg_sq"}
_KNOWN = {"step", "exp_avg", "exp_avg_scale", "exp_avg_sq", *FACTORS, "RMS", "weight_low"}
Migrate = Callable[[Source, Target], tuple[dict[str, Tensor], Migrated]]


class _Read(NamedTuple):
    """Contents of a state in float64, and their form."""

    step: float
    first: Tensor | None
    row: Tensor | None
    col: Tensor
    form: Form

    @property
    def square(self) -> Tensor:
        """The second moment that the factors stand for, their product."""
        if self.row is None:
            return self.col
        mean = self.row.mean(-1, keepdim=True)
        return ((self.row / mean).unsqueeze(-1) * self.col.unsqueeze(-2)).nan_to_num()


def is_factored(group: Mapping[str, Any]) -> bool:
    """Return whether a group's tensors keep factors."""
    return bool(rule_of(group["rule"], group["level"]).is_factored)


def has_factors(source: Source) -> bool:
    """Return whether a state is an Adafactor's: this package's, PyTorch's or transformers'."""
    state = source.state
    return source.group.get("rule") == ADAFACTOR.name or bool({*_TORCH, *FACTORS, "RMS"} & state.keys())


def migrate_factors(source: Source, target: Target, migrate: Migrate) -> tuple[dict[str, Tensor], Migrated]:
    """Return the new state of one parameter, and how it was made, if its old or new state keeps factors.

    Args:
        source: The old state.
        target: The parameter in the new optimizer.
        migrate: Converts states without factors.

    Raises:
        ValueError: the state is damaged, or the new one cannot be made from it.
    """
    p = torch.empty(target.param.shape, dtype=target.param.dtype, device="meta")
    if not has_factors(source):
        return _from_moments(source, target, p, migrate)
    read, first_note = _read(source, target, p)
    if not is_factored(target.group):
        return _to_moments(read, source, target, migrate)
    new = _form_of(target.group, p)
    width = p.shape[-1] if p.dim() else 1
    notes = {}
    state: dict[str, Any] = {"step": torch.tensor(read.step, dtype=torch.float64, device="cpu")}
    if slots_of(target.group):
        state |= _first(source, read, new, width)
        carried = describe(read.form, new)["exp_avg"]
        notes["exp_avg"] = "new: zeros" if read.first is None else first_note or carried
    elif read.first is not None:
        notes["exp_avg"] = "dropped: beta1 is None"
    same = read.form.kind == new.kind
    plain = [form._replace(rule="gwt", dtype=torch.float64) for form in (read.form, new)]
    moments = {"exp_avg": torch.zeros_like(read.col), "exp_avg_sq": read.col}
    col = read.col if same else convert(moments, plain[0], plain[1], width)["exp_avg_sq"]
    factors = _factors(p, read.row, col)
    note = "exact" if same else "approximate: as if gradients of neighbours were uncorrelated"
    state, notes = state | factors, notes | dict.fromkeys(factors, note)
    return finished(state, notes, source, target, p, (read.form, new))


def _from_moments(
    source: Source, target: Target, p: Tensor, migrate: Migrate
) -> tuple[dict[str, Tensor], Migrated]:
    """Return factors of Adam's second moment, and its first moment over the root of their product."""
    betas = source.group.get("betas") or (0.9, 0.999)
    plain = {**target.group, "rule": "gwt", "betas": betas, "eps": 0.0, "lr": 0.0, "state_dtype": None}
    moments, how = migrate(source, target._replace(group=plain))
    step = float(moments["step"])
    corrected = 1.0 - float(betas[1]) ** step if step and source.group.get("correct_bias", True) else 1.0
    square = moments["exp_avg_sq"].double() / corrected
    row, col = (_means(square, -1), _means(square, -2)) if square.dim() > 1 else (None, square)
    new = _form_of(target.group, p)
    read = _Read(step, None, row, col, new._replace(dtype=torch.float64))
    read = read._replace(
        first=(moments["exp_avg"].double() / read.square.sqrt()).nan_to_num(posinf=0.0, neginf=0.0)
    )
    state: dict[str, Tensor] = {key: moments[key] for key in ("step", "weight_low") if key in moments}
    notes = {key: note for key, note in how.notes.items() if key not in ("exp_avg", "exp_avg_sq")}
    if slots_of(target.group):
        state |= _first(source, read, new, p.shape[-1] if p.dim() else 1)
        notes["exp_avg"] = f"approximate: over the root of the factors; {how.notes['exp_avg']}"
    else:
        notes["exp_avg"] = "dropped: beta1 is None"
    factors = _factors(p, row, col)
    state |= factors
    notes |= dict.fromkeys(factors, f"approximate: means of the second moment; {how.notes['exp_avg_sq']}")
    return finished(state, notes, source, target, p, (how.before, new))


def _to_moments(
    read: _Read, source: Source, target: Target, migrate: Migrate
) -> tuple[dict[str, Tensor], Migrated]:
    """Return Adam's moments from factors: their product, and the first moment times its root."""
    square = read.square
    first = torch.zeros_like(square) if read.first is None else read.first * square.sqrt()
    betas = target.group.get("betas", (0.9, 0.999))  # optimizers without betas correct no bias by them
    biased = 1.0 - float(betas[1]) ** read.step if target.group["correct_bias"] else 1.0
    form = read.form
    made = {
        "step": torch.tensor(read.step, dtype=torch.float64, device="cpu"),
        "exp_avg": first,
        "exp_avg_sq": square * biased,
    }
    options = {
        "level": form.level,
        "rule": "gwt",
        "wavelet": form.wavelet,
        "boundary": form.boundary,
        "betas": betas,
    }
    options |= {"state_dtype": "float64", "norm_growth_limit": None, "correct_bias": target.group["correct_bias"]}
    kept = {key: source.state[key] for key in ("weight_low",) if key in source.state}
    state, how = migrate(source._replace(group=options, state={**made, **kept}), target)
    notes = how.notes | {"exp_avg": "approximate: times the root of the factors; " + how.notes["exp_avg"]}
    if read.first is None:
        notes["exp_avg"] = "new: zeros"
    if not how.notes.get("exp_avg_sq", "dropped").startswith("dropped"):
        notes["exp_avg_sq"] = "approximate: the product of the factors; " + how.notes["exp_avg_sq"]
    return state, how._replace(before=form, notes=notes)


def _means(square: Tensor, dim: int) -> Tensor:
    """Return the means along a dimension; 0 if it has no elements."""
    return square.mean(dim) if square.shape[dim] else square.sum(dim)


def _first(source: Source, read: _Read, new: Form, width: int) -> dict[str, Tensor]:
    """Return the first moment in the form ``new``."""
    is_own = "level" in source.group and {"exp_avg", "exp_avg_scale"} & source.state.keys()
    if is_own and is_factored(source.group) and read.form == new:  # bit for bit
        return convert(source.state, read.form, new, width)
    first = torch.zeros_like(read.square) if read.first is None else read.first
    return convert({"exp_avg": first}, read.form._replace(dtype=torch.float64), new, width)


def _read(source: Source, target: Target, p: Tensor) -> tuple[_Read, str]:
    """Return a state's contents, and a note on its first moment, if any, besides that of its conversion."""
    group = source.group
    state = {_TORCH.get(key, key): x for key, x in source.state.items()}
    if unknown := sorted(map(str, state.keys() - _KNOWN)):
        raise ValueError(
            f"its state has {unknown[0]!r}, which no Adafactor keeps: leave it behind with "
            f"keys={{{unknown[0]!r}: None}}"
        )
    form = Form(0, "adafactor", "haar", "zero", torch.float32)
    if "level" in group:
        form = form_of_options(source, target.group, p.shape, form.dtype)
    if isinstance(m := state.get("exp_avg"), Tensor):
        form = form._replace(dtype=m.dtype)
    step = number_in({"step": math.nan, **state}, "step")
    shape = state_shape(p, form._asdict())
    parts = {}
    for key, dims in factor_dims(p.dim()).items():
        x, expected = state.get(key), tuple(shape[d] for d in dims)
        if not isinstance(x, Tensor) or x.numel() != math.prod(expected):
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else "no tensor"
            raise ValueError(
                f"its {key} has {found}, but {form} needs {expected}: build the optimizer from the model that the "
                f"state was made with"
            )
        if not x.isfinite().all() or (x < 0).any():
            raise ValueError(f"its {key} holds numbers that are not finite, or below 0: take an earlier state")
        parts[key] = x.detach().double().reshape(expected)
    row, col = (None, *parts.values())[-2:]
    assert col is not None
    first, note = _first_of(state, group, form, shape, step)
    return _Read(step, first, row, col, form), note


def _first_of(
    state: Mapping[str, Any], group: Mapping[str, Any], form: Form, shape: tuple[int, ...], step: float
) -> tuple[Tensor | None, str]:
    """Return a state's first moment, of updates not multiplied by a learning rate, and a note on how."""
    m = state.get("exp_avg")
    if m is None:
        return None, ""
    if not isinstance(m, Tensor):
        raise ValueError(f"its exp_avg is {m!r}, no tensor: it is damaged; take another state")
    if tuple(m.shape) != shape:
        raise ValueError(f"its exp_avg has shape {tuple(m.shape)}, but {form} needs {shape}: take another state")
    if "level" in group:
        return convert(state, form, form._replace(dtype=torch.float64), 1)["exp_avg"], ""
    rate: Any = group.get("lr")
    if group.get("relative_step") and step:
        rate = min(1e-6 * step if group.get("warmup_init") else 1e-2, 1.0 / math.sqrt(step))
    if group.get("scale_parameter"):
        rate = float(rate or 0.0) * max(float(group["eps"][1]), number_in(state, "RMS"))
    rate = float(rate or 0.0)
    if not rate > 0:
        return None, ""
    return m.detach().double() / rate, f"approximate: over the last step's learning rate, {rate:.3g}"


def _factors(p: Tensor, row: Tensor | None, col: Tensor) -> dict[str, Tensor]:
    """Return the factors as entries of a parameter's state; without a row factor if it has one dimension."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    named = zip(reversed(factor_dims(p.dim())), (col, row), strict=False)
    return {key: x.to(dtype).contiguous() for key, x in named if x is not None}


def _form_of(group: Mapping[str, Any], p: Tensor) -> Form:
    template: dict[str, Tensor] = {}
    complete(template, p, group)
    dtype = template["exp_avg"].dtype if "exp_avg" in template else torch.promote_types(p.dtype, torch.float32)
    return form_of(group, p.shape, dtype)

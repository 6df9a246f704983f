"""``gwt_kernels.migrate``: convert the state of another optimizer, level, rule or dtype."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gwt_kernels.core.dtensor import any_sharded
from gwt_kernels.core.hyper import Boundary, Rule
from gwt_kernels.core.level import ROW
from gwt_kernels.formats.moments import MOMENTS, SCALES, wide
from gwt_kernels.migration.conversion import Form, convert, describe, form_of, update_norm
from gwt_kernels.migration.factored import has_factors, is_factored, migrate_factors
from gwt_kernels.migration.foreign import as_one, is_of_muon, own_entries
from gwt_kernels.migration.records import Migrated, bytes_of_state, finished, form_of_options, number_in
from gwt_kernels.migration.records import Source as _Source
from gwt_kernels.migration.records import Target as _Target
from gwt_kernels.migration.schedules import Origin, origins_of, with_rates
from gwt_kernels.optim.base import PlannedOptimizer
from gwt_kernels.optim.names import check_names, plain_names
from gwt_kernels.optim.state import check_state, complete, row_shape, slots_of, state_shape, upgraded
from gwt_kernels.rules import check_rule, rule_of

_KNOWN = {"step", *MOMENTS, *SCALES, "limiter_norm", "weight_low", "max_exp_avg_sq"}


@dataclass(frozen=True)
class Migration:
    """Result of :func:`migrate`. ``str()`` says for each kind of tensor what is exact and what approximate."""

    state_dict: dict[str, Any]
    """New state, for ``optimizer.load_state_dict``."""
    tensors: tuple[Migrated, ...]
    """Records of the tensors that have a state, in the optimizer's order."""
    origins: tuple[Origin, ...] = ()
    """For each group of the new state the old group that its parameters come from."""

    @property
    def is_exact(self) -> bool:
        """Whether nothing was approximated, rounded or dropped."""
        notes = [note for tensor in self.tensors for note in tensor.notes.values()]
        return not any(note.startswith(("approximate", "dropped")) or "rounded" in note for note in notes)

    def __str__(self) -> str:
        alike: dict[Any, list[Migrated]] = defaultdict(list)
        for tensor in self.tensors:
            alike[(tensor.before, tensor.after, *tensor.notes.items())].append(tensor)
        lines = []
        for members in alike.values():
            first, n = members[0], len(members)
            others = f" and {n - 1} more" if n > 1 else ""
            lines.append(f"{first.before} -> {first.after}: {first.name}{others}")
            lines += [f"    {key:<13} {note}" for key, note in first.notes.items()]
        before, after = (sum(getattr(t, key) for t in self.tensors) for key in ("bytes_before", "bytes_after"))
        return "\n".join([*lines, f"state: {before:,} bytes before, {after:,} after"])


def migrate(
    state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    optimizer: PlannedOptimizer,
    *,
    names: nn.Module | Sequence[str] | None = None,
    rule: Rule = "gwt",
    wavelet: str = "haar",
    boundary: Boundary = "zero",
    keys: Mapping[str, str | None] | None = None,
) -> Migration:
    """Convert a state that ``optimizer`` would refuse into one that it loads; both are left unchanged.

    Takes the state of ``torch.optim.AdamW``, ``Adam``, ``Muon`` or ``Adafactor``, of transformers' ``Adafactor``,
    of an optimizer of this package with another level, rule, dtype of moments, weight rounding, limiter, bias
    correction, wavelet, boundary or grouping, and of other optimizers that keep ``step``, ``exp_avg`` and
    ``exp_avg_sq`` per parameter, such as the published one.
    What is exact and what approximate is on the page docs/migrate.md, and in ``str()`` of the result. Options
    (learning rate, betas and so on) are the optimizer's own; moments made with other betas are rescaled, so that
    the bias-corrected moments stay the same. What a schedule wrote into the state's groups, such as ``initial_lr``,
    is kept; a learning rate other than the state's becomes the initial one.

    Parameters are matched by name. The optimizer's groups and the state's have names if they were built from named
    parameters, as by `gwt_param_groups`; ``names`` gives missing names. If neither has any, parameters are matched
    by order, which requires groups of the same sizes.

    Args:
        state_dict: What ``torch.optim.Optimizer.state_dict`` returns; or a list of several, such as of a Muon for
            matrices and an AdamW for the rest.
        optimizer: The new optimizer over the same parameters, on any device (also ``"meta"``), with its options.
        names: The model, if the state is of an optimizer over ``model.parameters()``, in one group; otherwise
            the names of the state's parameters, group after group, which override its own.
        rule: Rule of a state that has fewer coefficients than weights and does not record its rule.
        wavelet: Wavelet of such a state.
        boundary: Boundary of such a state.
        keys: This package's names of entries that the state names otherwise, such as
            ``{"norm": "limiter_norm"}``; None drops an entry.

    Returns:
        The new state, with tensors on the device of the old ones, and how each was made.

    Raises:
        ValueError: the state is not one, is empty, or does not fit; the message names the parameter, the value
            and the remedy.
        TypeError: an argument has the wrong type.
    """
    if not isinstance(optimizer, PlannedOptimizer):
        raise TypeError(f"optimizer must be a GWTAdamW or another of this package, got {type(optimizer).__name__}")
    if names is not None and (isinstance(names, str) or not isinstance(names, nn.Module | Sequence)):
        raise TypeError(f"names must be a module or a sequence of names, got {type(names).__name__}")
    if isinstance(names, Sequence) and (wrong := [name for name in names if not isinstance(name, str)]):
        raise TypeError(f"names must be a module or a sequence of names, got {wrong[0]!r} among them")
    if not isinstance(keys, Mapping | None):
        raise TypeError(f"keys must be a dict, such as {{'norm': 'limiter_norm'}}, got {type(keys).__name__}")
    check_rule(rule, wavelet, boundary)
    unsaid = {"rule": rule, "wavelet": wavelet, "boundary": boundary}
    one = as_one(state_dict)
    sources = _sources(one, names, keys or {})
    if not any(source.state for source in sources):
        raise ValueError(
            "the state holds nothing of any parameter, so there is nothing to migrate: take one saved after a "
            "step, or begin with a fresh optimizer"
        )
    made: dict[int, dict[str, Tensor]] = {}
    tensors = []
    pairs = _pairs(sources, _targets(optimizer, names))
    for i, (source, target) in enumerate(pairs):
        if source.state:
            try:
                made[i], how = _migrated(source, target, unsaid)
            except ValueError as error:
                raise ValueError(f"{target.label}: {error}") from None
            tensors.append(how)
    before, after = one["param_groups"], optimizer.state_dict()
    origins = origins_of([(source.group, target.group) for source, target in pairs], before, optimizer.param_groups)
    groups = with_rates(after["param_groups"], origins, before)
    return Migration({**after, "state": made, "param_groups": groups}, tuple(tensors), origins)


def names_in(state_dict: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a state's parameters, group after group; None if it has none."""
    groups = state_dict["param_groups"]
    if any(group.get("param_names") is None for group in groups):
        return None
    for group in groups:
        check_names(group["param_names"])
    return [name for group in groups for name in group["param_names"]]


# Who is who -----------------------------------------------------------------------------------------------


def _sources(
    state_dict: Mapping[str, Any], names: nn.Module | Sequence[str] | None, keys: Mapping[str, str | None]
) -> list[_Source]:
    groups, states = state_dict["param_groups"], state_dict["state"]
    members = [(group, key) for group in groups for key in group["params"]]
    if isinstance(names, Sequence):
        known_names: list[str] | None = list(names)
    else:
        known_names = names_in(state_dict)
        if known_names is None and names is not None:
            known_names = _names_by_order(names, [len(group["params"]) for group in groups])
    if known_names is not None and len(known_names) != len(members):
        raise ValueError(
            f"there are {len(known_names)} names for the {len(members)} parameters of the state: give one for "
            f"each, group after group"
        )
    stray = states.keys() - {key for _, key in members}
    if stray:
        raise ValueError(
            f"the state holds {sorted(map(str, stray))[:5]}, which are in none of its groups: it is damaged, or "
            f"not a whole state; take another"
        )
    plain = [None] * len(members) if known_names is None else plain_names(known_names)
    held = [own_entries(states.get(key, {}), group, keys) for group, key in members]
    return [
        _Source(name, group, upgraded(state), bytes_of_state(state))
        for name, (group, _), state in zip(plain, members, held, strict=True)
    ]


def _names_by_order(model: nn.Module, sizes: list[int]) -> list[str]:
    if len(sizes) != 1:
        raise ValueError(
            f"the state has {len(sizes)} groups, of {sizes} parameters, without names, so that the model's order "
            f"does not tell who is who: pass names=[...], the names in the state's order, group after group"
        )
    every = dict(model.named_parameters())
    for parameters in (every, {name: p for name, p in every.items() if p.requires_grad}):
        if len(parameters) == sizes[0]:
            return list(parameters)
    raise ValueError(
        f"the state is of {sizes[0]} parameters, the model has {len(every)}: pass the model that it was made with, "
        f"or names=[...]"
    )


def _targets(optimizer: PlannedOptimizer, names: nn.Module | Sequence[str] | None) -> list[_Target]:
    in_model = {p: name for name, p in names.named_parameters()} if isinstance(names, nn.Module) else {}
    found: list[tuple[str | None, Tensor, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        known_names = group.get("param_names") or [in_model.get(p) for p in group["params"]]
        found += [(name, p, group) for name, p in zip(known_names, group["params"], strict=True)]
    given = [name for name, _, _ in found if name is not None]
    plain: list[Any] = list(plain_names(given) if len(given) == len(found) else [None] * len(found))
    return [
        _Target(name, f"parameter {i if name is None else repr(name)} of shape {tuple(p.shape)}", p, group)
        for i, (name, (_, p, group)) in enumerate(zip(plain, found, strict=True))
    ]


def _pairs(sources: list[_Source], targets: list[_Target]) -> list[tuple[_Source, _Target]]:
    named = [members[0].name is not None for members in (sources, targets)]
    if all(named):
        by_name = {source.name: source for source in sources}
        for target in targets:
            if target.name not in by_name:
                raise ValueError(
                    f"the state has nothing named {target.name!r}, but for example {sources[0].name!r}: build the "
                    f"optimizer from the model that the state was made with, or pass names=[...]"
                )
        extra = [s for s in sources if s.name not in {target.name for target in targets} and s.state]
        if extra:
            raise ValueError(
                f"the state has moments of {extra[0].name!r}, which is not in the optimizer: build it from the "
                f"same model, frozen in the same places"
            )
        return [(by_name[target.name], target) for target in targets]
    if any(named):
        without = "the optimizer's groups have" if named[0] else "the state has"
        remedy = (
            "build them from model.named_parameters() or gwt_param_groups(model), or pass names=model"
            if named[0]
            else "pass names=model for a state of an optimizer over model.parameters(), or the names in its order"
        )
        raise ValueError(f"{without} no names, and the order need not be the same: {remedy}")
    sizes = [list(Counter(id(member.group) for member in members).values()) for members in (sources, targets)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has groups of {sizes[0]} parameters without names, the optimizer of {sizes[1]}, so that "
            f"their places do not tell who is who: pass names=model, or build the same groups"
        )
    return list(zip(sources, targets, strict=True))


# One parameter --------------------------------------------------------------------------------------------


def _migrated(source: _Source, target: _Target, unsaid: Mapping[str, Any]) -> tuple[dict[str, Tensor], Migrated]:
    """Return one parameter's new state, and how it was made; ``unsaid`` are options of a state that has none."""
    if any_sharded(source.state.values()):
        raise ValueError(
            "its state is of shards, of which this process has parts: load the checkpoint on one process without "
            "shards, migrate it there, and save it again by torch.distributed.checkpoint"
        )
    if away := [key for key, x in source.state.items() if isinstance(x, Tensor) and x.device.type == "meta"]:
        raise ValueError(
            f"its {away[0]} is on the meta device, which holds no numbers: load the state onto the CPU first"
        )
    if has_factors(source) or is_factored(target.group):
        return migrate_factors(source, target, lambda has, wants: _migrated(has, wants, unsaid))
    p = torch.empty(target.param.shape, dtype=target.param.dtype, device="meta")
    source, unsaid = _as_momentum(source, target, unsaid)
    old = _form(source, p, target.group, unsaid)
    step = _checked(source.state, p, old)
    _check_finite(source.state, old)
    template: dict[str, Tensor] = {}
    complete(template, p, target.group)
    new = form_of(target.group, p.shape, template["exp_avg"].dtype)
    corrects = all(rule_of(form.rule, form.level).corrects_bias for form in (old, new))
    factors = _other_bias(source.group.get("betas"), target.group["betas"], step) if corrects else (1.0, 1.0)
    width = p.shape[-1] if p.dim() else 1
    state = {
        "step": torch.tensor(step, dtype=torch.float64, device="cpu"),
        **convert(source.state, old, new, width, factors),
    }
    notes = describe(old, new)
    if factors != (1.0, 1.0):
        notes = {key: f"approximate: rescaled for other betas; {note}" for key, note in notes.items()}
    _check_finite(state, new)
    device = source.state["exp_avg"].device
    same = old.kind == new.kind and factors == (1.0, 1.0)
    if "limiter_norm" in template:
        norm, notes["limiter_norm"] = _limiter_norm(source, state, old, new, target.group["eps"], same)
        state["limiter_norm"] = torch.tensor(norm, dtype=template["limiter_norm"].dtype, device=device)
    elif "limiter_norm" in source.state:
        notes["limiter_norm"] = "dropped: the optimizer has no limiter here"
    if "max_exp_avg_sq" in source.state:
        notes["max_exp_avg_sq"] = "dropped: there is no amsgrad here"
    if source.group.get("decoupled_weight_decay") is False and source.group.get("weight_decay"):
        notes["weight_decay"] = "approximate: Adam's is part of the moments, and fades from them with the betas"
    return finished(state, notes, source, target, p, (old, new))


def _as_momentum(source: _Source, target: _Target, unsaid: Mapping[str, Any]) -> tuple[_Source, Mapping[str, Any]]:
    """Return a foreign state with a momentum alone, such as SGD's or Lion's, as one of Muon's, at step 0.

    A step count that it has is kept. Other states are returned unchanged, as are all if the target keeps more.
    """
    state, group = source.state, source.group
    is_momentum = isinstance(state.get("exp_avg"), Tensor) and "exp_avg_sq" not in state
    if "level" in group or not is_momentum or slots_of(target.group) != ("exp_avg",):
        return source, unsaid
    start = {"step": torch.zeros((), dtype=torch.float64, device="cpu")}
    return source._replace(state={**start, **state}), {**unsaid, "rule": "muon"}


def _form(source: _Source, p: Tensor, defaults: Mapping[str, Any], unsaid: Mapping[str, Any]) -> Form:
    """Return the form of a state's moments: from its group's options, or else from their shape."""
    group, m = source.group, source.state.get("exp_avg")
    if not isinstance(m, Tensor):
        raise ValueError(
            f"its state has no tensor exp_avg, but {sorted(map(str, source.state))}: pass the state of an Adam or "
            f"of a Muon, or say with keys={{...}} what its entries are called"
        )
    if "level" in group:
        return form_of_options(source, defaults, p.shape, m.dtype)
    if is_of_muon(group):
        unsaid = {**unsaid, "rule": "muon"}
    for level in range(64):
        shape = state_shape(p, {**unsaid, "level": level}) if p.dim() or not level else ()
        if tuple(m.shape) == shape:
            return form_of({**unsaid, "level": level}, p.shape, m.dtype)
        if level and (not p.dim() or 2**level >= 2 * p.shape[-1]):
            break
    raise ValueError(
        f"its exp_avg has shape {tuple(m.shape)}, which no level makes of this parameter: the state is of another "
        f"model, or its parameters came in another order; pass names=[...] in the state's order"
    )


def _checked(state: Mapping[str, Any], p: Tensor, form: Form) -> float:
    """Return the step count of a state that is complete and fits; raise a ValueError for any other."""
    unknown = sorted(map(str, state.keys() - _KNOWN))
    if unknown:
        raise ValueError(
            f"its state has {unknown[0]!r}, whose meaning is unknown: say it with "
            f"keys={{{unknown[0]!r}: 'limiter_norm'}} or another name, or leave it behind with "
            f"keys={{{unknown[0]!r}: None}}"
        )
    stored = form.stored
    numbers = ("step", "limiter_norm")
    slots = form.slots
    needed = {"step", *slots, *stored.scales_of(slots)}
    missing = sorted(
        key for key in needed | state.keys()
        if not isinstance(state.get(key), Tensor | float | int if key in numbers else Tensor)
    )  # fmt: skip
    if missing:
        raise ValueError(f"its state lacks {', '.join(missing)}: it is damaged, or no Adam's; take another")
    shape = state_shape(p if p.dim() or form.level in (0, ROW) else p.view(1), form._asdict())
    shapes = {**dict.fromkeys(MOMENTS, shape), "weight_low": (*p.shape, 2)}
    shapes |= dict.fromkeys(form.row_slots, row_shape(p, form.head_rows))
    for key in shapes.keys() & state.keys():
        if tuple(state[key].shape) != shapes[key]:
            raise ValueError(
                f"its {key} has shape {tuple(state[key].shape)}, but {form} needs {shapes[key]}: build the "
                f"optimizer from the model that the state was made with"
            )
    found = [cast(Tensor, state[key]).dtype for key in slots]
    dense = all(state[key].layout == torch.strided for key in slots)
    if found[0].is_floating_point and found[0].itemsize == 1:
        raise ValueError(f"its moments are {found[0]}, in which nothing is computed: make them float32 first")
    wides, pairs = form.row_slots, zip(slots, stored.dtypes, strict=False)
    kept = [wide(x).dtypes[0] if key in wides else x for key, x in pairs]
    if found != kept or not dense or not stored.arithmetic.is_floating_point:
        layouts = "" if dense else ", not dense"
        raise ValueError(
            f"its moments are {' and '.join(map(str, found))}{layouts}: the state is damaged; take another"
        )
    if stored.scales:
        check_state(
            {key: state[key] for key in needed - {"step"}} | {"step": torch.zeros((), dtype=torch.float64,
            device="cpu")}, p, {"level": form.level, "rule": form.rule, "wavelet": form.wavelet,
            "state_dtype": stored.name, "norm_growth_limit": None}, "its moments", stored.scales_of(slots),
        )  # fmt: skip
    for key in numbers:
        number_in(state, key)
    return number_in(state, "step")


def _limiter_norm(
    source: _Source, state: Mapping[str, Tensor], old: Form, new: Form, eps: float, same: bool
) -> tuple[float, str]:
    """Return the norm from which the limiter continues, and how it was made."""
    norm = number_in(source.state, "limiter_norm")
    if "limiter_norm" in source.state and same:
        return norm, "exact"
    size = update_norm(source.state, old, float(source.group.get("eps", eps)))
    if not norm or not size:
        return 0.0, "new: none yet, as at a first step, which is not limited"
    # The limiter may have kept the norm far below that of the moments: it continues to do so.
    return norm * update_norm(state, new, eps) / size, "approximate: the same share of the norm of the moments"


def _check_finite(state: Mapping[str, Tensor], form: Form) -> None:
    for key in form.stored.scales_of(form.slots) or form.slots:
        x = state[key]
        if not x.isfinite().all() or (key != "exp_avg" and (x < 0).any()):
            raise ValueError(
                f"its {key} holds numbers that are not finite in {form.dtype}, or below 0 where only squares can "
                f"be: take the state of an earlier step"
            )


def _other_bias(old: Any, new: tuple[float, float], step: float) -> tuple[float, float]:
    """Return factors on both moments after ``step`` steps that give them the bias towards 0 of the new betas."""
    if old is None or not step:
        return 1.0, 1.0
    if not isinstance(old, list | tuple) or len(old) != 2 or not all(0 <= float(beta) < 1 for beta in old):
        raise ValueError(
            f"the betas of its state are {old!r}, not two numbers below 1: it is damaged; take another"
        )
    if tuple(map(float, old)) == tuple(map(float, new)):
        return 1.0, 1.0
    first, second = ((1 - float(b) ** step) / (1 - float(a) ** step) for a, b in zip(old, new, strict=True))
    return first, second

"""Convert learning-rate schedules, which keep values for each group, to the groups of a run's new optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_RATES = ("initial_lr", "max_lr", "min_lr")
_OTHERS = ("base_momentum", "max_momentum")
"""What PyTorch's schedules write into an optimizer's groups."""
_RATES_OF_ALL = ("base_lrs", "min_lrs", "max_lrs")
_LISTS = (*_RATES_OF_ALL, "_last_lr", "lr_lambdas", "base_momentums", "max_momentums")
"""Lists that schedules keep themselves, with a value for each group."""

Group = Mapping[str, Any]


class Origin(NamedTuple):
    """The old group that a new group's parameters come from."""

    place: int
    factor: float
    """Ratio of new to old learning rates; 1 if the new group has the old one's."""


def origins_of(
    members: Iterable[tuple[Group, Group]], before: Sequence[Group], after: Sequence[Group]
) -> tuple[Origin, ...]:
    """Return the origin of each new group; of several, the first one with its learning rate.

    Args:
        members: The old and the new group of each parameter, the same objects as in ``before`` and ``after``.
        before: All old groups.
        after: All new groups.
    """
    places = {id(group): i for i, group in enumerate(before)}
    sources: dict[int, dict[int, None]] = {id(group): {} for group in after}
    for old, new in members:
        sources[id(new)].setdefault(places[id(old)])
    made = []
    for group in after:
        every = [*sources[id(group)]] or [0]
        alike = [i for i in every if _rate(before[i], "lr") == _rate(group, "lr")]
        place = (alike or every)[0]
        made.append(Origin(place, 1.0 if alike else _factor(before[place], group)))
    return tuple(made)


def with_rates(groups: Sequence[Group], origins: Sequence[Origin], before: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the groups, with options that a schedule wrote into the old ones where they do not have them.

    A learning rate other than the old one becomes the initial one.
    """
    made = []
    for group, origin in zip(groups, origins, strict=True):
        old, written = before[origin.place], {}
        for key in [key for key in (*_RATES, *_OTHERS) if key in old and group.get("lr") is not None]:
            written[key] = float(old[key]) * origin.factor if key in _RATES else old[key]
        if "initial_lr" in written and origin.factor != 1.0:
            written["initial_lr"] = float(group["lr"])
        made.append({**written, **group})
    return made


def is_schedule(value: object, groups: int | None = None) -> bool:
    """Return whether this is what a schedule's ``state_dict()`` returns, for so many ``groups``; None: for any."""
    if not isinstance(value, Mapping) or not {"last_epoch", "_schedulers"} & value.keys():
        return False
    last = value.get("_last_lr")
    return isinstance(last, list | tuple) and groups in (None, len(last))


def renewed(
    schedule: Mapping[str, Any], origins: Sequence[Origin], groups: Sequence[Group], before: int
) -> dict[str, Any]:
    """Return a schedule's state for the new groups, each with the values of the old group that it comes from.

    Args:
        schedule: State that the schedule's ``state_dict()`` returns.
        origins: Origins of the new groups.
        groups: The new groups.
        before: Number of old groups.
    """
    made = dict(schedule)
    for key in [key for key in _LISTS if isinstance(schedule.get(key), list | tuple)]:
        if len(schedule[key]) == before:
            kept = [schedule[key][origin.place] for origin in origins]
            made[key] = [x * o.factor for x, o in zip(kept, origins, strict=True)] if key in _RATES_OF_ALL else kept
    if "_last_lr" in made:
        made["_last_lr"] = [group["lr"] for group in groups]
    if isinstance(made.get("_schedulers"), list | tuple):
        made["_schedulers"] = [
            renewed(each, origins, groups, before) if is_schedule(each, before) else each
            for each in made["_schedulers"]
        ]
    return made


def schedules_in(payload: Any) -> list[tuple[Any, ...]]:
    """Return the places of schedules in a checkpoint: keys of its entries, or keys and indices in lists there."""
    found: list[tuple[Any, ...]] = []
    for name, value in payload.items() if isinstance(payload, Mapping) else ():
        if isinstance(value, list | tuple):  # as Lightning keeps them
            found += [(name, i) for i, each in enumerate(value) if is_schedule(each)]
        elif is_schedule(value):
            found.append((name,))
    return found


def _rate(group: Group, key: str) -> float | None:
    return None if group.get(key) is None else float(group[key])


def _factor(old: Group, new: Group) -> float:
    rate, initial = _rate(new, "lr"), _rate(old, "initial_lr") or _rate(old, "lr")
    return rate / initial if rate is not None and initial else 1.0

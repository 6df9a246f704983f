"""``gwt-kernels migrate``: convert the state of optimizers in a checkpoint file, and write another file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gwt_kernels.migration.carried import Recipe, optimizer_for
from gwt_kernels.migration.foreign import as_one, is_state
from gwt_kernels.migration.schedules import is_schedule, renewed, schedules_in
from gwt_kernels.migration.states import Migration, migrate, names_in
from gwt_kernels.migration.unpickling import load
from gwt_kernels.models.files import build_on_meta


class Reading(NamedTuple):
    """How a checkpoint is read.

    Attributes:
        names: Names of the parameters in the state's order, if it has none and is in neither known order.
        renamed: ``keys`` of :func:`gwt_kernels.migrate`.
        keys: Key of the state in the file if it holds several; of several optimizers, the key of each.
        allow: As for :func:`read`.
        prefix: Prefix of the parameters' names, if the optimizer is over a module with the model as an attribute.
    """

    names: list[str] | None = None
    renamed: dict[str, str | None] | None = None
    keys: Sequence[str] = ()
    allow: Iterable[str] = ()
    prefix: str | None = None


class Written(NamedTuple):
    """What :func:`migrate_file` did.

    Attributes:
        migration: How the state was converted.
        notes: A sentence on each schedule of the checkpoint.
    """

    migration: Migration
    notes: list[str]


def migrate_file(
    checkpoint: Path,
    out: Path,
    config: str | Path,
    *,
    dtype: torch.dtype | None = None,
    recipe: Recipe,
    reading: Reading,
    **options: Any,
) -> Written:
    """Write a copy of a checkpoint with its optimizer's state and schedules converted, and all else unchanged.

    Schedules keep values for each group; those of this optimizer get values for the new groups. They are in the
    file, or in one beside it, such as ``scheduler.pt`` beside ``optimizer.pt``; its copy is written beside ``out``.

    The state is made for the optimizer of ``rule``, such as ``GWTAdamW(gwt_param_groups(model, level=...,
    include=..., exclude=...), ...)``, over the model that the configuration describes. Options are the checkpoint's
    unless given, as :func:`gwt_kernels.migration.carried.optimizer_for` says; weight decay is its only one besides
    0, on the tensors that `gwt_param_groups` decays. A state without names is assumed to be of an optimizer over
    ``model.parameters()`` if it has one group, and of Hugging Face's Trainer if it has two. States of several
    optimizers become one, in the place of the first; the others' places are removed.

    Args:
        checkpoint: File written by ``torch.save``: the optimizer's ``state_dict``, or a dict that holds it. It is
            read without executing anything in it but the classes in ``reading.allow``.
        out: The new file, written completely or not at all. Must not exist.
        config: A preset's name, a Hugging Face ``config.json``, or its folder.
        dtype: dtype of the weights; None for the configuration's.
        recipe: Which parameters are transformed, and at which level.
        reading: How the checkpoint is read.
        options: ``rule``, options of its optimizer, and ``adamw_lr``.

    Returns:
        What was done.

    Raises:
        OSError: a file cannot be read or written.
        ValueError, TypeError: as :func:`gwt_kernels.migrate`, or the file is no checkpoint.
    """
    check_free(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}: make it, or give --out another name")
    payload = read(checkpoint, reading.allow)
    found = [find_state(payload, checkpoint, key) for key in reading.keys or (None,)]
    places, states = zip(*found, strict=True)
    if len(set(places)) < len(places):
        raise ValueError(f"--key names {reading.keys} twice: name each optimizer's state once")
    state = as_one(states)
    model, names = _within(build_on_meta(config, dtype), reading.prefix), reading.names
    if names is None and names_in(state) is None:
        names = _likely_names(model, state)
    optimizer = optimizer_for(model, state, recipe, options)
    migration = migrate(state, optimizer, names=names, keys=reading.renamed)
    payload, notes = _with_schedules(payload, places, migration, len(state["param_groups"]))
    payload = _replaced(payload, places[0], migration.state_dict)
    for place in sorted(places[1:], key=lambda each: [str(each[0]), *each[1:]], reverse=True):
        payload = _without(payload, place)
    beside, its_out = _beside(checkpoint, checkpoint), _beside(out, checkpoint)
    if places != ((),) or beside is None or its_out is None or not beside.is_file():
        write(out, payload)
        return Written(migration, notes)
    schedule, groups = read(beside, reading.allow), len(state["param_groups"])
    if not is_schedule(schedule, groups):
        write(out, payload)
        return Written(migration, [f"{beside}: no schedule of the {groups} groups of before, so left alone"])
    check_free(its_out)
    write(out, payload)
    try:
        write(its_out, _renewed(schedule, migration, groups))
    except BaseException:
        out.unlink()
        raise
    return Written(migration, [f"{its_out}: the schedule of {beside} for the new groups, to load with {out}"])


def check_free(out: Path) -> None:
    """Raise a FileExistsError if the path exists, even as a dangling link."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists, and nothing is overwritten: give --out another name")


def read(path: Path, allow: Iterable[str] = ()) -> Any:
    """Return what ``torch.save`` wrote, on the CPU. Only plain data is read, and nothing is executed.

    Args:
        path: The file.
        allow: Further classes that it may hold, ``module.Class``; these are imported and executed.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, is truncated, or holds more than tensors and plain data.
    """
    if (path / ".metadata").is_file():
        raise IsADirectoryError(
            f"{path} is a checkpoint of torch.distributed.checkpoint: make it a file by python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE, and give that"
        )
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the file in it that holds the optimizer's state")
    with path.open("rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty: the checkpoint was never written whole; take another")
    return load(path, allow)


def find_state(payload: Any, path: Path, key: str | None = None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the keys that lead to the optimizer's state in a checkpoint, and the state.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = _states_in(payload)
    if key is not None:
        found = {place: state for place, state in found.items() if ".".join(map(str, place)) == key}
    if not found:
        top = sorted(map(str, payload))[:8] if isinstance(payload, Mapping) else type(payload).__name__
        where = f" at {key!r}" if key is not None else ""
        raise ValueError(
            f"{path} holds no optimizer's state{where}, which has 'state' and 'param_groups', but {top}: give the "
            f"file that it is in, such as optimizer.pt beside a model's weights"
        )
    if len(found) > 1:
        places = ", ".join(".".join(map(str, place)) for place in found)
        raise ValueError(
            f"{path} holds several optimizers' states, at {places}: say which with --key, or repeat it for those "
            f"that become one"
        )
    return next(iter(found.items()))


def write(path: Path, payload: Any) -> None:
    """Save like ``torch.save``, but write the file completely or not at all, and replace no other file.

    Raises:
        OSError: the file cannot be written, or the path exists, even if only since this call began.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("xb") as file:
                torch.save(payload, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch.save may raise the second because of the first
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path} cannot be written: {cause}: give --out another place") from error
        try:
            os.link(partial, path)  # fails if the path exists, which a rename would replace
        except FileExistsError:
            check_free(path)
            raise
        except OSError:  # a file system without hard links
            check_free(path)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _states_in(payload: Any) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Return the optimizers' states in a checkpoint, by the keys that lead to them."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {(): payload} if is_state(payload) else {}
    if not found and isinstance(payload, Mapping):
        for name, value in payload.items():
            members = enumerate(value) if isinstance(value, list | tuple) else ()  # as Lightning keeps them
            found |= {(name, i): each for i, each in members if is_state(each)}
            found |= {(name,): value} if is_state(value) else {}
    return found


def _with_schedules(
    payload: Any, places: Sequence[tuple[Any, ...]], migration: Migration, groups: int
) -> tuple[Any, list[str]]:
    """Return a copy of a checkpoint with this optimizer's schedules for its new groups, and what was done.

    With several optimizers, a schedule belongs to the one at the same place in a list of the same length.
    """
    made, notes, several = payload, [], len(_states_in(payload)) > 1
    for place in schedules_in(payload):
        name, *within = place
        schedule = payload[name][within[0]] if within else payload[name]
        is_its_place = len(places) == 1 and place[1:] == places[0][1:] != ()
        known = not several or (is_its_place and len(payload[name]) == len(payload[places[0][0]]))
        label = ".".join(map(str, place))
        if known and is_schedule(schedule, groups):
            made = _replaced(made, place, _renewed(schedule, migration, groups))
            notes.append(f"{label}: the schedule, for the new groups")
        else:
            notes.append(f"{label}: the schedule as it was, of other groups or another optimizer")
    return made, notes


def _renewed(schedule: Mapping[str, Any], migration: Migration, groups: int) -> dict[str, Any]:
    return renewed(schedule, migration.origins, migration.state_dict["param_groups"], groups)


def _beside(path: Path, checkpoint: Path) -> Path | None:
    """Return the schedule's file beside an optimizer's, as Trainer and Accelerate name them; None if unknown."""
    if "optimizer" not in checkpoint.name:
        return None
    if "optimizer" in path.name:
        return path.with_name(path.name.replace("optimizer", "scheduler"))
    return path.with_name(f"{path.stem}.scheduler{path.suffix}")


def _replaced(payload: Any, place: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """Return a copy of the nested containers along ``place``, with the state there."""
    if not place:
        return state
    within = payload[place[0]]
    if isinstance(payload, Mapping):
        return {**payload, place[0]: _replaced(within, place[1:], state)}
    return [*payload[: place[0]], _replaced(within, place[1:], state), *payload[place[0] + 1 :]]


def _without(payload: Any, place: tuple[Any, ...]) -> Any:
    """Return a copy of the nested containers along ``place``, without what is there."""
    if isinstance(payload, Mapping):
        rest = {key: value for key, value in payload.items() if key != place[0]}
        return rest if len(place) == 1 else {**rest, place[0]: _without(payload[place[0]], place[1:])}
    return [*payload[: place[0]], *payload[place[0] + 1 :]]


def _within(model: nn.Module, prefix: str | None) -> nn.Module:
    """Return a module that has the model at the attribute path ``prefix``; None for the model itself.

    Raises:
        ValueError: the prefix is no path of attributes.
    """
    for name in reversed([] if prefix is None else prefix.removesuffix(".").split(".")):
        outer = nn.Module()
        try:
            outer.add_module(name, model)
        except KeyError as error:
            raise ValueError(
                f"--prefix {prefix!r} is no path of attributes: give that of the model in the module that the "
                f"optimizer is over, such as model"
            ) from error
        model = outer
    return model


def _likely_names(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Return the names of a state's parameters, from the number of its groups.

    Raises:
        ValueError: neither order fits.
    """
    every = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    decayed = _decayed_by_trainer(model) & set(every) if len(sizes) == 2 else set()
    likely = {
        1: every,
        2: [name for name in every if name in decayed] + [name for name in every if name not in decayed],
    }.get(len(sizes))
    expected = [len(every)] if len(sizes) == 1 else [len(decayed), len(every) - len(decayed)]
    if likely is None or sizes != expected:
        raise ValueError(
            f"the state has groups of {sizes} parameters without names, neither the {len(every)} of the model in "
            f"one group nor Trainer's two of {expected if len(sizes) == 2 else 'decayed and other ones'}: is the "
            f"configuration that of its model? Otherwise give --names, a file with a name per line, in its order"
        )
    return likely


def _decayed_by_trainer(model: nn.Module) -> set[str]:
    """Return the parameters that Hugging Face's Trainer puts into the first of its two groups."""
    trainer: Any = importlib.import_module("transformers").Trainer
    return set(trainer.get_decay_parameter_names(None, model))

"""Decide which tensors of a model are transformed, at which level, and why."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from gwt_kernels.checks import check_initialized
from gwt_kernels.haar import deepest_level
from gwt_kernels.sharding import ROWS_STAY

# Path components that name a role, as the model families in use spell it: Hugging Face (self_attn, attn,
# SelfAttention; mlp, ffn, fc1, DenseReluDense, experts), nanoGPT (attn, mlp), torchtitan (attention,
# feed_forward, moe), torch.nn.Transformer (self_attn, linear1).
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|^ff(w|wd)?$|feed_?forward|moe|densereludense|^fc\d$|^linear\d$", re.IGNORECASE)
_EXPERT = re.compile(r"expert", re.IGNORECASE)
_ROUTER = re.compile(r"router", re.IGNORECASE)
_GATE = re.compile(r"(^|_)gate$", re.IGNORECASE)
_HEAD = re.compile(r"head$", re.IGNORECASE)
_HEAD_BY_ITS_OWN_NAME = re.compile(r"^(output|score|classifier|embed_out|decoder)$")
_BIAS = re.compile(r"(^|_)bias(_|$)")

# What torch.compile, activation checkpointing and FSDP insert into a qualified name, at any depth.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Decision(NamedTuple):
    """What happens to one parameter, and why."""

    name: str
    """Qualified name without wrapper prefixes; for tied weights the first one."""
    shape: tuple[int, ...]
    level: int
    """Levels of the wavelet transform; 0 means plain AdamW."""
    decayed: bool
    """Whether weight decay applies."""
    reason: str


class _Use(NamedTuple):
    """One place where a parameter is registered; a tied weight has several."""

    name: str
    owner: nn.Module
    siblings: frozenset[str]


def gwt_param_groups(
    model: nn.Module,
    *,
    level: int = 2,
    scale: float = 0.25,
    weight_decay: float = 0.0,
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for `GWTAdamW`, by the published recipe.

    The matrices of attention and MLP layers are transformed. Embeddings, the output head and MoE routers stay
    at level 0 (plain AdamW) with weight decay; norms, biases and other 1-D tensors stay at level 0 without.
    Whatever the recipe does not name stays at level 0 too; `verbose=True` shows the reason for each tensor.

    Args:
        model: Any module, on any device ("meta" included), wrapped by `torch.compile`, DDP or FSDP or not.
        level: Levels of the transform for the matrices of the recipe.
        scale: Factor on the update of the transformed matrices. Groups at level 0 carry 1.
        weight_decay: Decoupled weight decay of the groups that decay.
        include: Regular expressions, tried with `re.search` on the qualified names, of matrices to transform
            besides those of the recipe. Only tensors with two or more dimensions are affected, and no biases.
        exclude: Regular expressions of parameters to leave at level 0. Wins over `include`.
        verbose: Print a table of what was decided, and why.

    Returns:
        The groups that are not empty, as plain dicts with "params", "param_names", "level", "scale" and
        "weight_decay": the transformed matrices, the other decayed tensors, the tensors without decay. Each
        trainable parameter appears exactly once, tied weights under their first name; frozen ones are left
        out. Names carry no wrapper prefix: they do not change when a model is compiled or wrapped in DDP.

    Raises:
        TypeError: `model` is no module, or `include` or `exclude` is a single string.
        ValueError: no trainable parameter; a level, scale or weight decay out of range; a pattern that is no
            regular expression or matches nothing; an included matrix too narrow for the level.
        RuntimeError: a parameter of a lazy module has no shape before the first forward pass.

    Source: the recipe of GWT (arXiv 2501.07237): the tensors that GaLore (arXiv 2403.03507) projects.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
    decided = decide(model, level=level, include=include, exclude=exclude)
    if verbose:
        print(describe(decision for _, decision in decided))
    if level > 0 and all(decision.level == 0 for _, decision in decided):
        warnings.warn(
            f"gwt_param_groups found nothing to transform in {type(model).__name__}: every tensor stays at "
            "level 0, which is plain AdamW. Name the matrices with include=[...]; verbose=True says why.",
            UserWarning,
            stacklevel=2,
        )

    groups: list[dict[str, Any]] = []
    for transformed, decayed in ((True, True), (False, True), (False, False)):
        members = [(p, d) for p, d in decided if (d.level > 0, d.decayed) == (transformed, decayed)]
        if members:
            groups.append(
                {
                    "params": [parameter for parameter, _ in members],
                    "param_names": [decision.name for _, decision in members],
                    "level": level if transformed else 0,
                    "scale": scale if transformed else 1.0,
                    "weight_decay": weight_decay if decayed else 0.0,
                }
            )
    return groups


def decide(
    model: nn.Module,
    *,
    level: int = 2,
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
) -> list[tuple[nn.Parameter, Decision]]:
    """Return each trainable parameter once, in the model's order, with what `gwt_param_groups` decides.

    Arguments and errors as for `gwt_param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; "
            "the decision needs the modules, so pass the model and not its parameters"
        )
    if isinstance(level, bool) or not isinstance(level, int) or level < 0:
        raise ValueError(f"level must be an integer of at least 0, got {level!r}")
    if any(_is_fsdp1(module) for module in model.modules()):
        raise TypeError(f"{type(model).__name__} is wrapped by FSDP1, which flattens its parameters: {ROWS_STAY}")
    check_initialized((f"parameter {name!r}", p) for name, p in model.named_parameters() if p.requires_grad)
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)

    uses = _uses(model)
    _check_matches("include", included, uses)
    _check_matches("exclude", excluded, uses)
    decided = [
        (parameter, _decide(parameter, places, level, included, excluded))
        for parameter, places in uses.items()
        if parameter.requires_grad
    ]
    if not decided:
        frozen = f": all {len(uses)} have requires_grad=False" if uses else ""
        raise ValueError(f"{type(model).__name__} has no trainable parameter{frozen}")
    return decided


def describe(decisions: Iterable[Decision]) -> str:
    """Return the decisions as an aligned table; layers that differ only in their number share a row."""
    rows: dict[tuple[str, ...], int] = defaultdict(int)
    totals = {True: [0, 0], False: [0, 0]}
    for d in decisions:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", d.name)
        rows[name, str(d.shape), str(d.level), "yes" if d.decayed else "no", d.reason] += 1
        totals[d.level > 0][0] += 1
        totals[d.level > 0][1] += math.prod(d.shape)
    table: list[tuple[str, ...]] = [("parameter", "count", "shape", "level", "decay", "reason")]
    table += [(name, str(count), *rest) for (name, *rest), count in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    elements = max(totals[True][1] + totals[False][1], 1)
    for transformed, label in ((True, "transformed"), (False, "at level 0")):
        tensors, size = totals[transformed]
        lines.append(f"{label}: {tensors} tensors, {size:,} elements ({100 * size / elements:.1f} %)")
    return "\n".join(lines)


def _decide(
    parameter: nn.Parameter,
    places: list[_Use],
    level: int,
    include: list[re.Pattern[str]],
    exclude: list[re.Pattern[str]],
) -> Decision:
    """The whole rule for one parameter: patterns first, then the recipe, then the width."""
    shape = tuple(parameter.shape)
    name = places[0].name
    roles = [_role(parameter, use) for use in places]
    # A weight tied to an embedding or head must not be transformed, whatever else it is used as.
    in_recipe, decayed, reason = min(roles, key=lambda role: role[0])
    if len(places) > 1:
        reason += f", tied to {', '.join(use.name for use in places[1:])}"

    if any(_matches(pattern, places) for pattern in exclude):
        return Decision(name, shape, 0, decayed, f"excluded by pattern ({reason})")
    deepest = deepest_level(shape[-1]) if shape else 0
    if _is_matrix(parameter, name) and any(_matches(pattern, places) for pattern in include):
        if level > deepest:
            raise ValueError(
                f"{name} was included but its width of {shape[-1]} is too narrow for level {level}: the "
                f"deepest level that fits is {deepest}; lower the level or exclude the tensor"
            )
        return Decision(name, shape, level, True, f"included by pattern ({reason})")
    if in_recipe and level > deepest:
        return Decision(
            name, shape, 0, decayed, f"{reason}, but a width of {shape[-1]} holds at most level {deepest}"
        )
    return Decision(name, shape, level if in_recipe else 0, decayed, reason)


def _role(parameter: nn.Parameter, use: _Use) -> tuple[bool, bool, str]:
    """What the recipe says of one use of a parameter: (transformed, decayed, reason)."""
    *path, leaf = use.name.split(".")
    module = path[-1] if path else ""
    kinds = [cls.__name__ for cls in type(use.owner).__mro__]
    linear = any(kind.endswith("Linear") or kind == "Conv1D" for kind in kinds)  # Conv1D: the Linear of HF's GPT-2

    if not _is_matrix(parameter, use.name):
        return False, False, "bias" if _BIAS.search(leaf) else "norm or other 1-D tensor"
    if isinstance(use.owner, nn.Embedding | nn.EmbeddingBag):
        return False, True, "embedding"
    if not linear and any("norm" in kind.lower() for kind in kinds):
        return False, False, "norm"
    beside_experts = any(_EXPERT.search(sibling) for sibling in use.siblings)
    if any(_ROUTER.search(part) for part in path) or (_GATE.search(module) and beside_experts):
        return False, True, "MoE router"
    if any(_HEAD.search(part) for part in path):
        return False, True, "output head"
    if isinstance(use.owner, nn.MultiheadAttention):
        return True, True, "attention matrix"
    if any(_EXPERT.search(part) for part in path):  # fused experts are bare parameters, not the weight of a Linear
        return True, True, "expert matrix"
    if linear and any(_ATTENTION.search(part) for part in path):
        return True, True, "attention matrix"
    if linear and any(_MLP.search(part) for part in path):
        return True, True, "MLP matrix"
    if linear and _HEAD_BY_ITS_OWN_NAME.search(module):
        return False, True, "output head"
    return False, True, f"{kinds[0]}, not an attention or MLP matrix"


def _is_matrix(parameter: nn.Parameter, name: str) -> bool:
    return parameter.ndim >= 2 and not _BIAS.search(name.rpartition(".")[2])


def _uses(model: nn.Module) -> dict[nn.Parameter, list[_Use]]:
    """Map each parameter, in the model's order, to every place that registers it, named without wrappers."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    modules = [(clean_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    children: dict[str, set[str]] = defaultdict(set)
    for name, _ in modules:
        parent, _, child = name.rpartition(".")
        children[parent].add(child)
    uses: dict[nn.Parameter, list[_Use]] = defaultdict(list)
    for name, module in modules:
        siblings = frozenset(children[name.rpartition(".")[0]])
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses[parameter].append(_Use(f"{name}.{leaf}" if name else leaf, module, siblings))
    return dict(uses)


def _is_fsdp1(module: nn.Module) -> bool:
    return any(
        (kind.__module__.split(".")[:3], kind.__name__)
        == (["torch", "distributed", "fsdp"], "FullyShardedDataParallel")
        for kind in type(module).__mro__
    )


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return what a wrapper at the root of the model holds, or None."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    else:
        inner = next((model._modules[wrapper] for wrapper in _WRAPPERS if wrapper in model._modules), None)
    return inner if isinstance(inner, nn.Module) else None


def clean_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _patterns(option: str, patterns: Sequence[str | re.Pattern[str]] | None) -> list[re.Pattern[str]]:
    if isinstance(patterns, str | re.Pattern):
        raise TypeError(
            f"{option} must be a sequence of regular expressions, got {patterns!r}; write [{patterns!r}]"
        )
    compiled = []
    for pattern in patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return compiled


def _matches(pattern: re.Pattern[str], places: Iterable[_Use]) -> bool:
    return any(pattern.search(use.name) for use in places)


def _check_matches(option: str, patterns: list[re.Pattern[str]], uses: dict[nn.Parameter, list[_Use]]) -> None:
    for pattern in patterns:
        hits = [(parameter, places[0].name) for parameter, places in uses.items() if _matches(pattern, places)]
        if not hits:
            example = f"; names look like {next(iter(uses.values()))[0].name!r}" if uses else ""
            raise ValueError(f"{option}: the pattern {pattern.pattern!r} matches no parameter{example}")
        if option == "include" and not any(_is_matrix(parameter, name) for parameter, name in hits):
            raise ValueError(
                f"include: the pattern {pattern.pattern!r} matches no matrix, only {hits[0][1]!r} of shape "
                f"{tuple(hits[0][0].shape)} and the like; name tensors with two or more dimensions"
            )

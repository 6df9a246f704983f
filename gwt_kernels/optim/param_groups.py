"""Decide which tensors of a model are transformed, at which level, and why."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gwt_kernels.core.hyper import Rule
from gwt_kernels.core.level import ROW, Level
from gwt_kernels.distributed.sharding import ROWS_STAY
from gwt_kernels.haar.transform import deepest_level
from gwt_kernels.optim.blocks import Layout, is_convolution, is_embedding, is_linear, is_norm, owner_of
from gwt_kernels.optim.checks import check_initialized
from gwt_kernels.optim.numbers import number
from gwt_kernels.rules import ADAMW, check_rule

# Path components that name a role, as spelled by model families: Hugging Face (self_attn, attn,
# SelfAttention; mlp, ffn, fc1, DenseReluDense, experts), nanoGPT (attn, mlp), torchtitan (attention, feed_forward,
# moe), torch.nn.Transformer (self_attn, linear1). In repeated blocks Linears need none.
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_HAS_HEADS = re.compile(r"attn|attention|^heads$", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|^ff(w|wd)?$|feed_?forward|moe|densereludense|^fc\d$|^linear\d$", re.IGNORECASE)
_EXPERT = re.compile(r"expert", re.IGNORECASE)
_ROUTER = re.compile(r"router", re.IGNORECASE)
_GATE = re.compile(r"(^|_)gate$", re.IGNORECASE)
_HEAD = re.compile(r"head$", re.IGNORECASE)
_HEAD_CLASS = re.compile(r".Head$")
_HEAD_BY_ITS_OWN_NAME = re.compile(r"^(output|score|classifier|embed_out|decoder)$")
_BESIDE = re.compile(r"pooler|embed", re.IGNORECASE)
_LOW_RANK = re.compile(r"^lora_", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)bias(_|$)")

# Reasons for the decision about a tensor.
ATTENTION = "attention matrix"
MLP = "MLP matrix"
EXPERT = "expert matrix"
BLOCK = "matrix of a repeated block"
VECTOR = "norm or other 1-D tensor"
BIAS = "bias"
NORM = "norm"
EMBEDDING = "embedding"
CONVOLUTION = "convolution"
LOW_RANK = "low-rank adapter"
ROUTER = "MoE router"
HEAD = "output head"
BESIDE = "part of a pooler or an embedding"
ONE_OUTPUT = "one output: a score or a gate"
OUTSIDE = "Linear outside of the repeated blocks"
NO_LINEAR = "not the weight of a Linear"
"""Suffix to the name of the class that has the parameter."""

# Components that torch.compile, activation checkpointing, FSDP and Lightning Fabric insert into names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")


class Decision(NamedTuple):
    """The decision about one parameter, and its reason."""

    name: str
    """Qualified name without wrapper prefixes; for tied weights the first one."""
    shape: tuple[int, ...]
    level: Level
    """Levels of the wavelet transform; 0 for none."""
    decayed: bool
    """Whether weight decay applies."""
    reason: str
    is_transformed: bool = False
    """Whether the optimizer's rule applies, also at level 0."""


class _Use(NamedTuple):
    """One registration of a parameter; a tied weight has several."""

    name: str
    path: tuple[str, ...]
    """Path to the owner, which for a parametrized weight is the parametrized module."""
    owner: nn.Module
    siblings: frozenset[str]


def gwt_param_groups(
    model: nn.Module,
    *,
    level: Level = 2,
    scale: float = 0.25,
    weight_decay: float = 0.0,
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
    rule: Rule | None = None,
    adamw_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for this package's optimizers, by the published recipe.

    The matrices of experts and of the Linears in repeated blocks (attention, MLPs, mixers) are transformed, and
    elsewhere those of modules named like attention or MLP. Embeddings, the output head, MoE routers and modules
    other than Linears stay at level 0 (``rule="adamw"``) with weight decay; norms, biases and other 1-D tensors
    stay at level 0 without. docs/choosing.md has all rules, and :func:`gwt_kernels.plan.plan` says for each tensor
    which one applied.

    Args:
        model: Any module, on any device ("meta" included), wrapped by `torch.compile`, DDP or FSDP or not.
        level: Levels of the transform for the matrices of the recipe, or ``"row"``.
        scale: Factor on the update of the transformed matrices. Other groups have 1.
        weight_decay: Decoupled weight decay of the groups that decay.
        include: Regular expressions, tried with `re.search` on the qualified names, of matrices to transform
            besides those of the recipe. Only tensors with two or more dimensions are affected, and no biases.
        exclude: Regular expressions of parameters to leave at level 0. Wins over `include`.
        rule: Rule of the transformed matrices, which are then a separate group also at level 0; required for
            rules that are not AdamW there. None for the optimizer's.
        adamw_lr: Learning rate of tensors that are not transformed; None for the optimizer's.

    Returns:
        The non-empty groups of: transformed matrices, other decayed tensors, tensors without decay. They are dicts
        with "params", "param_names", "level", "scale" and "weight_decay". The first also has "rule" if `rule` is
        given; the others have "rule", which is "adamw", unless `level` is 0 and `rule` None, and "lr" if `adamw_lr`
        is set. Each trainable parameter appears exactly once, tied weights under their first name; frozen ones are
        left out. Names have no wrapper prefix: they do not change when a model is compiled or wrapped in DDP.

    Raises:
        TypeError: `model` is not a module, or `include` or `exclude` is a single string.
        ValueError: no trainable parameter; a level, scale or weight decay out of range; a pattern that is not
            a regular expression or matches nothing; an included matrix too narrow for the level.
        RuntimeError: a parameter of a lazy module has no shape before the first forward pass.

    Source: the recipe of GWT (arXiv 2501.07237): the tensors that GaLore (arXiv 2403.03507) projects.
    """
    if not (_is_finite("scale", scale) and scale > 0):
        raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
    if not (_is_finite("weight_decay", weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
    if rule is not None:
        check_rule(rule, "haar")
    if adamw_lr is not None and not (_is_finite("adamw_lr", adamw_lr) and adamw_lr >= 0):
        raise ValueError(f"adamw_lr must be a finite number of at least 0, got {adamw_lr!r}")
    decided = decide(model, level=level, include=include, exclude=exclude)
    if level and all(decision.level == 0 for _, decision in decided):
        warnings.warn(
            f"gwt_param_groups found nothing to transform in {type(model).__name__}: every tensor stays at "
            "level 0, which is plain AdamW. Name the matrices with include=[...]; "
            "gwt_kernels.plan.plan(model) says why.",
            UserWarning,
            stacklevel=2,
        )

    groups: list[dict[str, Any]] = []
    for transformed, decayed in ((True, True), (False, True), (False, False)):
        apart = bool(level) or rule is not None
        members = [(p, d) for p, d in decided if (d.is_transformed and apart, d.decayed) == (transformed, decayed)]
        if members:
            group = {
                "params": [parameter for parameter, _ in members],
                "param_names": [decision.name for _, decision in members],
                "level": level if transformed else 0,
                "scale": scale if transformed else 1.0,
                "weight_decay": weight_decay if decayed else 0.0,
            }
            if transformed and rule is not None:
                group["rule"] = rule
            elif apart and not transformed:
                group["rule"] = ADAMW.name
            if not transformed and adamw_lr is not None:
                group["lr"] = adamw_lr
            groups.append(group)
    return groups


def decide(
    model: nn.Module,
    *,
    level: Level = 2,
    include: Sequence[str | re.Pattern[str]] | None = None,
    exclude: Sequence[str | re.Pattern[str]] | None = None,
) -> list[tuple[nn.Parameter, Decision]]:
    """Return each trainable parameter once, in the model's order, with the decision of `gwt_param_groups`.

    Arguments and errors as for `gwt_param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; "
            "the decision needs the modules, so pass the model and not its parameters"
        )
    if isinstance(level, bool) or not (level == ROW or (isinstance(level, int) and level >= 0)):
        raise ValueError(f"level must be an integer of at least 0, got {level!r}, or 'row' for one block a row")
    if any(_is_fsdp1(module) for module in model.modules()):
        raise TypeError(f"{type(model).__name__} is wrapped by FSDP1, which flattens its parameters: {ROWS_STAY}")
    check_initialized((f"parameter {name!r}", p) for name, p in model.named_parameters() if p.requires_grad)
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    uses, layout = _uses(model)
    _check_matches("include", included, uses)
    _check_matches("exclude", excluded, uses)
    decided = [
        (parameter, _decide(parameter, places, layout, level, included, excluded))
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
        totals[bool(d.level)][0] += 1
        totals[bool(d.level)][1] += math.prod(d.shape)
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
    layout: Layout,
    level: Level,
    include: list[re.Pattern[str]],
    exclude: list[re.Pattern[str]],
) -> Decision:
    """Decide about one parameter: patterns first, then the recipe, then the width."""
    shape = tuple(parameter.shape)
    name = places[0].name
    roles = [_role(parameter, use, layout) for use in places]
    # A weight tied to an embedding or head must not be transformed, whatever its other uses.
    in_recipe, decayed, reason = min(roles, key=lambda role: role[0])
    if len(places) > 1:
        reason += f", tied to {', '.join(use.name for use in places[1:])}"

    if any(_matches(pattern, places) for pattern in exclude):
        return Decision(name, shape, 0, decayed, f"excluded by pattern ({reason})")
    deepest = deepest_level(shape[-1]) if shape else 0
    fits = level == ROW or level <= deepest
    if _is_matrix(parameter, name) and any(_matches(pattern, places) for pattern in include):
        if not fits:
            raise ValueError(
                f"{name} was included but its width of {shape[-1]} is too narrow for level {level}: the "
                f"deepest level that fits is {deepest}; lower the level or exclude the tensor"
            )
        return Decision(name, shape, level, True, f"included by pattern ({reason})", True)
    if in_recipe and not fits:
        return Decision(
            name, shape, 0, decayed, f"{reason}, but a width of {shape[-1]} holds at most level {deepest}"
        )
    return Decision(name, shape, level if in_recipe else 0, decayed, reason, in_recipe)


def _role(parameter: nn.Parameter, use: _Use, layout: Layout) -> tuple[bool, bool, str]:
    """Return the recipe's decision for one use of a parameter: (transformed, decayed, reason)."""
    leaf = use.name.rpartition(".")[2]
    if not _is_matrix(parameter, use.name):
        return False, False, BIAS if _BIAS.search(leaf) else VECTOR
    if is_embedding(use.owner):
        return False, True, EMBEDDING
    if is_norm(use.owner):
        return False, False, NORM
    why_not = _left(parameter, use, layout)
    if why_not is not None:
        return False, True, why_not
    if isinstance(use.owner, nn.MultiheadAttention):
        return True, True, ATTENTION
    if ".".join(use.path) in layout.experts or _any(_EXPERT, use.path):  # fused experts are bare parameters
        return True, True, EXPERT
    if not is_linear(use.owner):
        return False, True, f"{type(use.owner).__name__}, {NO_LINEAR}"
    if _any(_ATTENTION, use.path):
        return True, True, ATTENTION
    if _any(_MLP, use.path):
        return True, True, MLP
    if layout.depth_of_block(use.path):
        beside = _prevails(_depths(_BESIDE, use.path), use.path, layout)
        return (False, True, BESIDE) if beside else (True, True, BLOCK)
    return False, True, HEAD if _HEAD_BY_ITS_OWN_NAME.search(use.path[-1] if use.path else "") else OUTSIDE


def _left(parameter: nn.Parameter, use: _Use, layout: Layout) -> str | None:
    """Return why a matrix is left to AdamW regardless of blocks and names; None if it is not."""
    path = use.path
    if is_convolution(use.owner):
        return CONVOLUTION
    if _any(_LOW_RANK, path):
        return LOW_RANK
    gate = bool(path) and _GATE.search(path[-1]) and any(_EXPERT.search(sibling) for sibling in use.siblings)
    if gate or _any(_ROUTER, (*path, type(use.owner).__name__)) or ".".join(path) in layout.routers:
        return ROUTER
    heads = [depth for depth in range(1, len(path) + 1) if _is_head(path[:depth], layout)]
    if heads and _prevails([*heads, *_depths(_BESIDE, path)], path, layout):
        return HEAD
    return ONE_OUTPUT if is_linear(use.owner) and parameter.shape[0] == 1 else None


def _is_head(path: tuple[str, ...], layout: Layout) -> bool:
    """Return whether a module or its class is named like an output head, other than heads of attention."""
    if len(path) > 1 and _HAS_HEADS.search(path[-2]) and layout.depth_of_block(path[:-1]):
        return False
    kind = type(layout.modules[".".join(path)]).__name__
    return bool(_HEAD.search(path[-1]) or (_HEAD_CLASS.search(kind) and not _ATTENTION.search(kind)))


def _any(pattern: re.Pattern[str], parts: Iterable[str]) -> bool:
    return any(pattern.search(part) for part in parts)


def _depths(pattern: re.Pattern[str], path: Sequence[str]) -> list[int]:
    """Return the depths of the path components that match a pattern."""
    return [depth for depth, part in enumerate(path, 1) if pattern.search(part)]


def _prevails(named: list[int], path: tuple[str, ...], layout: Layout) -> bool:
    """Return whether a name overrides the block around it: in heads only blocks with norms are hidden layers."""
    return bool(named) and max(named) >= layout.depth_of_block(path, with_norm=True) - 1


def _is_matrix(parameter: nn.Parameter, name: str) -> bool:
    return parameter.ndim >= 2 and not _BIAS.search(name.rpartition(".")[2])


def _uses(model: nn.Module) -> tuple[dict[nn.Parameter, list[_Use]], Layout]:
    """Map each parameter, in the model's order, to its registrations, named without wrappers."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    modules = [(clean_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    layout = Layout(modules)
    children: dict[str, set[str]] = defaultdict(set)
    for name in layout.modules:
        parent, _, child = name.rpartition(".")
        children[parent].add(child)
    siblings_in = {parent: frozenset(names) for parent, names in children.items()}
    uses: dict[nn.Parameter, list[_Use]] = defaultdict(list)
    for name, module in modules:
        owner = owner_of(name)
        siblings = siblings_in[owner.rpartition(".")[0]]
        path = tuple(owner.split(".")) if owner else ()
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{name}.{leaf}" if name else leaf
            uses[parameter].append(_Use(full, path, layout.modules[owner], siblings))
    return dict(uses), layout


def _is_fsdp1(module: nn.Module) -> bool:
    return any(
        (kind.__module__.split(".")[:3], kind.__name__)
        == (["torch", "distributed", "fsdp"], "FullyShardedDataParallel")
        for kind in type(module).__mro__
    )


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper at the root of the model, or None."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    else:
        inner = next((model._modules[wrapper] for wrapper in _WRAPPERS if wrapper in model._modules), None)
    return inner if isinstance(inner, nn.Module) else None


def clean_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_finite(name: str, value: Any) -> bool:
    return math.isfinite(value if isinstance(value, Tensor) and value.numel() == 1 else number(name, value))


def _patterns(option: str, patterns: Sequence[str | re.Pattern[str]] | None) -> list[re.Pattern[str]]:
    if isinstance(patterns, str | re.Pattern):
        raise TypeError(
            f"{option} must be a sequence of regular expressions, got {patterns!r}; write [{patterns!r}]"
        )
    if not isinstance(patterns, Iterable | None):
        raise TypeError(f"{option} must be a sequence of regular expressions, got {patterns!r}")
    compiled = []
    for pattern in patterns or ():
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"{option} must be a sequence of regular expressions, got {pattern!r} among them")
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

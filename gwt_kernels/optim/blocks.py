"""Find the repeated blocks and mixtures of experts of a model, by its modules' structure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

_NUMBER = re.compile(r"\d+")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_Signature = frozenset[tuple[str, tuple[int, ...]]]
"""Name and shape of every parameter of a module that has two dimensions or more."""


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an ``nn.Linear``, a class named like it, or the Conv1D of GPT-2."""
    if _is_kind(module, r"^Conv1D$"):
        weight = module._parameters.get("weight")
        return weight is not None and weight.ndim == 2
    return _is_kind(module, r"Linear$")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module's class is named like a norm, and is not a Linear with a built-in norm."""
    return _is_kind(module, r"(?i:norm)") and not is_linear(module)


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is one of torch's embeddings, or its class is named like one."""
    return _is_kind(module, r"Embedding(Bag)?$") and not is_linear(module)


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is one of torch's convolutions, or its class is named like one."""
    return _is_kind(module, r"_ConvNd$|Conv(Transpose)?(\d[dD])?$") and not is_linear(module)


def _is_kind(module: nn.Module, pattern: str) -> bool:
    kind: Any = type(module)  # mypy regards classes of metaclasses as unhashable
    return _is_named(kind, pattern)


@lru_cache(maxsize=1024)
def _is_named(kind: Any, pattern: str) -> bool:
    return any(re.search(pattern, each.__name__) for each in kind.__mro__)


def owner_of(name: str) -> str:
    """Return the module that owns the parameters of a module: the parametrized one for a parametrization."""
    return f".{name}".partition(".parametrizations.")[0][1:]


class Layout:
    """Structure of a model's modules.

    A **repeated block** is a numbered child of a container (``layers.0``, ``layers.1``) that is similar to another
    one. Two modules are similar if half of one's matrices are in the other, by name and shape. A block has the
    matrices of two Linears, or of one Linear and a norm.

    A **layer** has a norm and the matrices of two Linears, and is not a stage, which has such blocks itself. Layers
    of the same class are also similar. A layer is a block if no other child has matrices, and in a
    ``ModuleList`` if two others are similar, since hybrid models may have a kind of layer only once.

    Args:
        modules: Qualified name and module, the root first. A wrapper precedes its wrapped module of the same
            name.

    Attributes:
        modules: Modules by name, without wrappers.
        blocks: Names of the repeated blocks.
        routers: Names of modules with one output for each of the experts beside them.
        experts: Names of modules whose direct three-dimensional parameters have a matrix for each expert.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.modules: dict[str, nn.Module] = dict(modules)  # a wrapped module replaces its wrapper
        self.blocks: set[str] = set()
        self.routers: set[str] = set()
        self.experts: set[str] = set()
        self._shapes: dict[str, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
        self._matrices: dict[str, int] = defaultdict(int)
        self._with_norm: set[str] = set()
        self._stages: set[str] = set()
        children: dict[str, list[str]] = {name: [] for name in self.modules}
        for name, module in self.modules.items():
            if name:
                children[name.rpartition(".")[0]].append(name)
            self._note(name, module)
        for parent in sorted(children, key=lambda name: -name.count(".") - bool(name)):  # the innermost first
            blocks = self._blocks_of(parent, children[parent])
            self.blocks |= blocks
            if blocks & self._with_norm:
                self._stages.update(around for around, _ in _ancestors(parent))
        for parent in children:
            if children[parent]:
                self._find_experts(parent, children)

    def depth_of_block(self, path: Sequence[str], *, with_norm: bool = False) -> int:
        """Return the number of path components of the innermost block around a module; 0 if there is none."""
        for depth in range(len(path), 0, -1):
            name = ".".join(path[:depth])
            if name in self.blocks and (not with_norm or name in self._with_norm):
                return depth
        return 0

    def _note(self, name: str, module: nn.Module) -> None:
        """Count a module's direct matrices and norm for every module around it."""
        owner = self.modules[owner_of(name)]
        own = [(leaf, tuple(p.shape)) for leaf, p in module._parameters.items() if p is not None and p.ndim > 1]
        matrices = int(bool(own) and (is_linear(owner) or isinstance(owner, nn.MultiheadAttention)))
        norm = is_norm(module)
        for around, rest in _ancestors(name) if own or norm else ():
            self._shapes[around].update((f"{rest}.{leaf}", shape) for leaf, shape in own)
            self._matrices[around] += matrices
            if norm:
                self._with_norm.add(around)

    def _blocks_of(self, parent: str, children: list[str]) -> set[str]:
        """Return the children of a container that are repeated blocks."""
        container = self.modules[parent]
        families: dict[str, list[str]] = defaultdict(list)
        for child in children:
            key = child.rpartition(".")[2]
            numbered = key.isdigit() or (isinstance(container, _CONTAINERS) and _NUMBER.search(key))
            if numbered and self._matrices[child] and not is_linear(self.modules[child]):
                families[_NUMBER.sub("#", key)].append(child)
        alone = sum(child in self._shapes for child in children) == 1
        blocks: set[str] = set()
        for members in families.values():
            alike = [] if alone else self._alike(members)
            blocks.update(alike)
            if alone or (alike and isinstance(container, nn.ModuleList)):
                blocks.update(member for member in members if self._is_layer(member))
        return blocks

    def _is_layer(self, member: str) -> bool:
        return member in self._with_norm and member not in self._stages and self._matrices[member] > 1

    def _alike(self, members: list[str]) -> list[str]:
        """Return the members that qualify as blocks and are similar to another member."""
        same: dict[tuple[_Signature, type | None], list[str]] = defaultdict(list)
        for member in members:
            if self._matrices[member] < 2 and member not in self._with_norm:
                continue
            kind = type(self.modules[member])
            tells = kind not in _CONTAINERS and self._is_layer(member)
            same[frozenset(self._shapes[member]), kind if tells else None].append(member)

        def like(one: tuple[_Signature, type | None], other: tuple[_Signature, type | None]) -> bool:
            shared = len(one[0] & other[0])
            return (one[1] is not None and one[1] is other[1]) or 2 * shared >= min(len(one[0]), len(other[0]))

        return [
            member
            for form, those in same.items()
            if len(those) > 1 or any(like(form, other) for other in same if other != form)
            for member in those
        ]

    def _find_experts(self, parent: str, children: dict[str, list[str]]) -> None:
        """Find routers, with one output for each of the experts beside them: fused ones, or a list of blocks."""
        within = (parent, *children[parent])
        fused = {name: {p.shape[0] for p in _fused(self.modules[name])} for name in within}
        listed = {
            sum(member in self.blocks and member not in self._with_norm for member in children[name])
            for name in children[parent]
        } - {0, 1}
        counts = listed.union(*fused.values())
        if not counts:
            return
        single = [child for child in children[parent] if self._matrices[child] <= 1]
        for name in [name for child in single for name in (child, *children[child])]:
            weight = self.modules[name]._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] in counts:
                self.routers.add(name)
                self.experts.update(each for each, numbers in fused.items() if weight.shape[0] in numbers)


def _ancestors(name: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a module and those around it, except the root, each with the rest of the path."""
    parts = name.split(".") if name else []
    for depth in range(len(parts), 0, -1):
        yield ".".join(parts[:depth]), ".".join(parts[depth:])


def _fused(module: nn.Module) -> list[Tensor]:
    """Return a module's direct parameters that may be a stack of experts' matrices."""
    tensors = [p for p in module._parameters.values() if p is not None and p.ndim == 3]
    likely = tensors and not (is_linear(module) or is_convolution(module) or is_norm(module))
    return [p for p in tensors if 1 < p.shape[0] < min(p.shape[1:])] if likely else []

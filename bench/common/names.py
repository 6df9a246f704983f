"""Names of optimizers in comparisons and records, such as `foam2-bf16`: their parts, and names for readers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from gwt_kernels.core.level import ROW, Level, depth_of

RULES = {
    "gwt": "GWT",
    "foam": "FOAM",
    "lion": "Lion",
    "adam_mini": "Adam-mini",
    "adafactor": "Adafactor",
    "muon": "Muon",
}
"""Rules of this package in the order of the pages, with the names that their authors use."""
ROWS = ("gwt", "foam", "lion", "adam_mini")
"""Rules that can have one block per row."""
ADAMS = ("gwt", "foam")
"""Rules that equal AdamW at level 0."""
PEERS = {
    "adamw": "AdamW", "torch_adafactor": "torch Adafactor",
    "galore": "GaLore", "apollo": "APOLLO", "apollo_mini": "APOLLO-Mini",
}  # fmt: skip

STORAGE = ("", "bf16", "int8", "nearest", "stochastic", "split")
"""Suffixes for the moments and for the rounding of weights, in the order of the pages; the default is first."""

_OWN = re.compile(
    rf"(?P<rule>{'|'.join(RULES)})(?P<level>\d|-row)(?:-(?P<details>published))?"
    r"(?:-(?P<moments>bf16|int8))?(?:-(?P<rounding>nearest|stochastic|split))?"
)


class Variant(NamedTuple):
    """Name of an optimizer of this package, in parts: gwt2-bf16-split."""

    rule: str
    level: Level
    moments: str = ""
    """Dtype of the moments; empty for float32."""
    rounding: str = ""
    """Rounding of the weights; empty for the default."""
    details: str = ""
    """How Adafactor treats the details; empty for the default."""

    @property
    def is_stored_plainly(self) -> bool:
        """Whether moments and weights have the default storage."""
        return not (self.moments or self.rounding)

    @property
    def swept_name(self) -> str:
        """Return the name under which settings are swept, which leaves storage out."""
        level = f"-{ROW}" if self.level == ROW else self.level
        return f"{self.rule}{level}" + (f"-{self.details}" if self.details else "")


def variant(name: str) -> Variant | None:
    """Parse a name; return None for an optimizer that is not from this package."""
    found = _OWN.fullmatch(name)
    if found is None:
        return None
    rule, level = found["rule"], found["level"]
    if (level == f"-{ROW}" and rule not in ROWS) or (found["details"] and rule != "adafactor"):
        return None
    own: Level = ROW if level == f"-{ROW}" else int(level)
    return Variant(rule, own, found["moments"] or "", found["rounding"] or "", found["details"] or "")


def check_name(name: str, option: str = "") -> str:
    """Return `name`, or raise a `ValueError` that lists the known names.

    Args:
        name: Name of an optimizer.
        option: The option that named it, for the message.
    """
    if name not in PEERS and variant(name) is None:
        where = f"{option}: " if option else ""
        raise ValueError(
            f"{where}unknown optimizer {name!r}: choose {', '.join(PEERS)}, "
            f"or {', '.join(f'{rule}L' for rule in RULES)} with a level L, such as gwt2 (muon0 is Muon itself, "
            f"adafactor0 Adafactor), or {', '.join(ROWS)} with "
            "-row for a level, such as foam-row; then -published for Adafactor's details as published, -bf16 or "
            "-int8 for the moments and -stochastic or -split for the weights, such as foam2-int8-split"
        )
    return name


def optimizer_name(name: str) -> str:
    """Return the name of an optimizer for readers: gwt2 is GWT level 2."""
    own = variant(name)
    if own is None:
        return PEERS.get(name, name)
    said = PEERS["adamw"] if own.rule in ADAMS and not own.level else RULES[own.rule]
    if own.level:
        said = f"{'' if said.isupper() else 'GWT-'}{said} " + ("row" if own.level == ROW else f"level {own.level}")
    words = [said, f"{own.details} details" if own.details else ""]
    words += [f"{own.moments} moments" if own.moments else "", f"{own.rounding} weights" if own.rounding else ""]
    return ", ".join(word for word in words if word)


def order_of(name: str) -> tuple[Any, ...]:
    """Return a sort key: peers, then this package's optimizers by rule, details, level and storage."""
    own = variant(name)
    if own is None:
        return (0, name)
    storage = (STORAGE.index(own.moments), STORAGE.index(own.rounding))
    return (1, list(RULES).index(own.rule), own.details, depth_of(own.level), *storage)

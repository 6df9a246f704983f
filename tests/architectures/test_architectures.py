"""gwt_param_groups on transformers' architectures: exact names for those in use, a rule for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import __main__ as architectures

RELEASE, EXPECTED = architectures.expected()
EVERY = 6
"""One in this many architectures is tested; ``python -m tests.architectures`` tests all of them."""


@pytest.mark.skipif(architectures.version() != RELEASE, reason=f"the names are those of transformers {RELEASE}")
@pytest.mark.parametrize("name", architectures.USED)
def test_groups_of_architectures_in_use(name: str) -> None:
    model = architectures.build_class(name)
    assert list(architectures.listing(model)) == EXPECTED[name]
    assert not architectures.broken(model)


def test_table_lists_the_architectures_in_use() -> None:
    assert tuple(EXPECTED) == architectures.USED
    for name in ("RobertaForMaskedLM", "ElectraForPreTraining", "MPNetForMaskedLM"):
        transformed = [line.partition(".encoder.")[2] for line in EXPECTED[name][: EXPECTED[name].index("  left")]]
        assert {"layer.*.intermediate: dense", "layer.*.output: dense"} <= set(transformed)


def test_every_linear_of_a_repeated_block_is_transformed_or_has_a_reason() -> None:
    """Check that embeddings, heads, norms, convolutions and biases stay as they are; reasons come from a set."""
    kinds = architectures.model_types()[::EVERY]
    built, faults = 0, []
    for kind in kinds:
        try:
            model = architectures.build(kind)
        except ValueError:  # needs a missing package, or more than a default configuration
            continue
        built += 1
        faults += [f"{kind}: {fault}" for fault in architectures.broken(model)]
    assert not faults
    assert built > 0.8 * len(kinds) > 25


def test_every_reason_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.endswith((" 0 |", " asked for |"))]
    listed = {reason for row in rows for reason in row.split(" | ")[0].removeprefix("| ").split("; ")}
    assert listed >= architectures.REASONS

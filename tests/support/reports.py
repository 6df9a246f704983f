"""A checkout with made-up results, and the report of it."""

from __future__ import annotations

from pathlib import Path

from bench.common import records
from bench.report import markdown
from bench.report.__main__ import GENERATED, main
from tests.support.made_up_rows import MAKERS, Row

README = """# Made up

<!-- speed -->
<!-- /speed -->

Words between the blocks.

<!-- tradeoff -->
old
<!-- /tradeoff -->
"""


def checkout(folder: Path) -> Path:
    """Create a checkout without results."""
    (folder / "docs").mkdir()
    (folder / "results").mkdir()
    (folder / "README.md").write_text(README)
    (folder / "docs" / "traps.md").write_text(
        "<!-- begin -->\n<!-- /begin -->\n\n<!-- tradeoff -->\n<!-- /tradeoff -->"
    )
    return folder


def record(place: Path, benchmark: str, about: Row, name: str = "") -> Path:
    path = place / "results" / f"{benchmark}_{name or markdown.slug(about['device'])}.json"
    records.append(path, benchmark, MAKERS[benchmark](about))
    return path


def report(place: Path, *arguments: str) -> int:
    return main([*arguments, "--results", str(place / "results"), "--root", str(place)])


def page(place: Path, name: str) -> str:
    return (place / "docs" / name).read_text()


def pages_on_speed(place: Path) -> str:
    return "\n".join(page(place, name) for name in GENERATED if name.startswith("performance"))


def pages_on_quality(place: Path) -> str:
    return "\n".join(page(place, name) for name in GENERATED if name.startswith("quality") or name == "sweeps.md")


def images(place: Path) -> set[str]:
    return {path.stem for path in (place / "docs" / "images").glob("*.svg")}

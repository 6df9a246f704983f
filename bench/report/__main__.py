"""Write the pages on performance and quality, their plots and the generated blocks of all pages; or check them.

python -m bench.report             # write what the results in bench/results say
python -m bench.report --check     # fail where a page does not say it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.common import records
from bench.report import (
    blocks,
    finetune,
    host,
    kernels,
    machine_code,
    optimizers,
    performance,
    plots,
    quality,
    quality_runs,
    rows,
    state,
    sweeps,
)

ROOT = Path(__file__).parents[2]
GENERATED = {
    "performance.md": performance,
    "performance_optimizers.md": optimizers,
    "performance_kernels.md": kernels,
    "performance_host.md": host,
    "performance_machine_code.md": machine_code,
    "quality.md": quality,
    "quality_runs.md": quality_runs,
    "sweeps.md": sweeps,
    "finetuning.md": finetune,
}
"""Pages that are generated as a whole, and the modules that generate them."""
MEND = "run `python -m bench.report` and commit what it writes"


def make(results: Path, root: Path) -> tuple[dict[Path, str], list[plots.Plot]]:
    """Return the text of every page under `root` with generated blocks and of their data files, and all plots.

    Raises:
        ValueError: a file of results is not in the known format, or a page has a block of unknown name.
    """
    runs = rows.load(results)
    pages = {
        page: blocks.fill(page.read_text(), runs, _to_docs(page, root)) for page in blocks.pages(root, GENERATED)
    }
    pages |= {root / "docs" / name: text for name, text in machine_code.files(runs).items()}
    drawn = [state.plot()]
    for name, part in GENERATED.items():
        text, own = part.page(runs)
        pages[root / "docs" / name] = f"<!-- Written by python -m bench.report; edit nothing here. -->\n\n{text}"
        drawn += own
    return pages, drawn


def _to_docs(page: Path, root: Path) -> str:
    return "" if page.parent == root / "docs" else "docs/"


def stale(pages: dict[Path, str], drawn: Sequence[plots.Plot], images: Path) -> list[str]:
    """Return the stale files, one line of text each."""
    found = []
    for path, text in pages.items():
        if not path.exists():
            found.append(f"{path}: missing")
        elif (old := path.read_text()) != text:
            lines = zip([*old.splitlines(), ""], [*text.splitlines(), ""], strict=False)
            line = next((i for i, (a, b) in enumerate(lines, 1) if a != b), len(old.splitlines()))
            found.append(f"{path}:{line}: not what the results say")
    for plot in drawn:
        path = images / f"{plot.name}.svg"
        if plots.digest_in(path) != plot.digest:
            found.append(f"{path}: {'drawn from other rows' if path.exists() else 'missing'}")
    return found + [f"{path}: shown nowhere" for path in left_over(drawn, images)]


def left_over(drawn: Sequence[plots.Plot], images: Path) -> list[Path]:
    """Return the pictures drawn by an earlier report and no longer part of this one."""
    names = {plot.name for plot in drawn}
    return [p for p in sorted(images.glob("*.svg")) if p.stem not in names and plots.digest_in(p)]


def write(pages: dict[Path, str], drawn: Sequence[plots.Plot], images: Path) -> None:
    """Write the pages, and the plots that are stale."""
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for plot in drawn:
        if plots.digest_in(images / f"{plot.name}.svg") != plot.digest:
            plots.draw(plot, images / f"{plot.name}.svg")
    for path in left_over(drawn, images):
        path.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a page is stale or the results cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is stale")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of raw JSON")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    options = parser.parse_args(arguments)
    images = options.root / "docs" / "images"
    try:
        pages, drawn = make(options.results, options.root)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.check:
        write(pages, drawn, images)
        print(f"{len(pages)} pages and {len(drawn)} plots are as {options.results} says")
        return 0
    if found := stale(pages, drawn, images):
        print("stale pages:", *(f"  {line}" for line in found), f"To mend them, {MEND}.", sep="\n", file=sys.stderr)
        return 1
    print(f"{len(pages)} pages and {len(drawn)} plots are fresh")
    return 0


if __name__ == "__main__":
    sys.exit(main())

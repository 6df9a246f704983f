"""Tables, numbers and names in the form used on the pages."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from bench.common import sources
from bench.report.rows import Row, Run

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SIZES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
"""Units and their names, the largest first."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Return a Markdown table whose columns are aligned to the right after the first `left` ones."""
    marks = ["---" if i < left else "--:" for i in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows))


def comma_separated(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as comma-separated values, if it is too long for a page."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headings, *rows])
    return text.getvalue()


def details(summary: str, body: str) -> str:
    """Return a collapsed section, for both the site and GitHub."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{body}\n\n</details>'


def figure(text: str, name: str, root: str = "") -> str:
    """Return the link to a plot; `root` leads from the page to `docs/`."""
    return f"![{text}]({root}images/{name}.svg)"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits and without an exponent."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}"


def duration(seconds: float) -> str:
    """Format a time with three significant digits, in the unit that needs no leading zeros."""
    return _in_units(seconds, TIMES)


def size(count: float) -> str:
    """Format a number of bytes with three significant digits, in the unit that needs no leading zeros."""
    return _in_units(count, SIZES)


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    if value == 0:
        return "0"
    factor, unit = next((each for each in units if float(f"{value:.2e}") >= each[0]), units[-1])
    return f"{number(value / factor)} {unit}"


def spread(row: Row | None, factor: float = 1.0) -> str:
    """Format a median, followed by the 20th and 80th percentile for several samples."""
    if row is None:
        return "-"
    text = number(factor * row["median"])
    if (row.get("samples") or 1) > 1 and row.get("p20") is not None:
        text += f" ({number(factor * row['p20'])}–{number(factor * row['p80'])})"
    return text


def with_spread(losses: Sequence[float]) -> str:
    """Format mean and standard deviation over seeds."""
    if not losses:
        return "-"
    return f"{mean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")


def percent(value: float | None) -> str:
    """Format a fraction as a percentage."""
    return "-" if value is None else f"{100 * value:.0f} %"


def cell(value: Any) -> str:
    """Format the value of a benchmark's own column."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " × ".join(map(str, value))
    return str(value).replace("|", "\\|")


def model_name(model: str | None) -> str:
    """Format a model's common name: llama_1b is LLaMA-1B."""
    found = re.fullmatch(r"llama_(\d+)([mb])", model or "")
    return f"LLaMA-{found[1]}{found[2].upper()}" if found else str(model)


def slug(text: str) -> str:
    """Return a name for files: in lower case, with hyphens for all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def setting(run: Run) -> str:
    """Format a run's settings in half a line, beside a table: backend, threads, date and commit."""
    row = run.rows[-1]
    words = [f"GWTAdamW on the `{row['own_backend']}` backend"] if row.get("own_backend") else []
    if row.get("threads") and not run.cuda:
        words.append(count(row["threads"], "thread"))
    if run.date:
        words.append(run.date[:10])
    words += _commit(row)
    return ", ".join([*words, *(["**the step's sources have changed since**"] if has_changed(run) else [])])


def period(rows: Sequence[Row]) -> str:
    """Format the settings of runs of several days in half a line: threads, and the first and the last date."""
    threads = sorted({row["threads"] for row in rows if row.get("threads")})
    words = [" or ".join(count(n, "thread") for n in threads)] if threads else []
    if dates := sorted({row["date"][:10] for row in rows if row.get("date")}):
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        words.append(f"runs of {days} (their commits are in `bench/results`)")
    return ", ".join(words)


def count(n: int, what: str) -> str:
    """Format a number of things."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def has_changed(run: Run) -> bool:
    """Return whether the sources of the timed step have changed since the run.

    Runs of the step in C that recorded no digest are older than the present sources.
    """
    row = run.rows[-1]
    backend, then = row.get("own_backend"), row.get("sources")
    if run.benchmark not in ("optimizers", "roundings") or not backend or (then is None and backend != "compiled"):
        return False
    return then != sources.digest(backend)


def _commit(row: Row) -> list[str]:
    if not row.get("commit"):
        return []
    commit, _, dirty = row["commit"].partition("-")
    return [f"commit {commit[:12]}" + (" and uncommitted changes" if dirty else "")]


def origin(run: Run) -> str:
    """Format the origin of a run's numbers in one line."""
    row = run.rows[-1]
    words = [f"`{row['command']}`"] if row.get("command") else []
    # The parts of a model, for benchmarks that take parts.
    words += [f"{key}: {cell(row[key])}" for key in ("layers", "embeddings") if row.get(key) is not None]
    if row.get("threads") and not run.cuda:
        words.append(count(row["threads"], "thread"))
    if run.cuda:
        words.append(f"driver {row['driver']}")
    words += [f"{key} {row[key]}" for key in ("torch", "triton") if row.get(key) not in (None, "none")]
    words += _commit(row)
    if run.date:
        words.append(run.date[:16].replace("T", " ") + " UTC")
    return f"{', '.join(words)} (`bench/results/{run.file}`)"

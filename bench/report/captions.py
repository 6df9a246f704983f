"""Captions of tables: size of the model, backend, threads, dates and commits of the runs in them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.markdown import count
from bench.report.rows import Row

__all__ = ["caption"]

NAMED = 3
"""Largest number of commits that are named; if there are more, only the newest is named."""


def caption(rows: Sequence[Row]) -> str:
    """Return the origin of a table's numbers, in half a line."""
    sizes = [
        f"{parameters / 1e6:.2f}M" for parameters in sorted({row.get("parameters") or 0 for row in rows} - {0})
    ]
    words = [f"{' and '.join(sizes)} parameters"] if sizes else []
    words.append(_backend(rows))
    if threads := sorted({row["threads"] for row in rows if row.get("threads")}):
        words.append(" or ".join(count(n, "thread") for n in threads))
    return ", ".join([*words, _dates(rows), *_commits(rows)])


def _backend(rows: Sequence[Row]) -> str:
    found = {row.get("own_backend") for row in rows}
    if named := sorted(f"`{backend}`" for backend in found if backend):
        return f"{' and '.join(named)} backend" + (" (of some runs not recorded)" if None in found else "")
    return "backend not recorded"


def _dates(rows: Sequence[Row]) -> str:
    dates = sorted({row["date"][:10] for row in rows if row.get("date")})
    if not dates:
        return "date not recorded"
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"runs of {days}" + ("" if all(row.get("date") for row in rows) else " (some undated)")


def _commits(rows: Sequence[Row]) -> list[str]:
    """Return the commits, the newest first; among commits without a date, that of a later row is newer."""
    last: dict[str, tuple[str, int]] = {}
    for i, row in enumerate(rows):
        if row.get("commit"):
            commit, _, dirty = row["commit"].partition("-")
            name = commit[:7] + (" with uncommitted changes" if dirty else "")
            last[name] = max(last.get(name, ("", -1)), (row.get("date") or "", i))
    named = sorted(last, key=lambda name: last[name], reverse=True)
    if not named:
        return []
    if len(named) > NAMED:
        return [f"commits {named[0]} and {len(named) - 1} more"]
    return [f"commit{'s' if len(named) > 1 else ''} {', '.join(named)}"]

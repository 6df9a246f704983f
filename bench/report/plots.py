"""Plots of the pages, each drawn only from the data passed to it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito's colours, distinguishable for the colour-blind, without the yellow that vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c564b")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")
OPEN_MARKERS = "o<>dHp"
"""Of other packages' optimizers where points may coincide."""
OWN, PEER = COLOURS[0], "#777777"
FAMILIES = {
    "AdamW": "#000000", "GWT": "#0072b2", "FOAM": "#009e73", "Muon": "#d55e00",
    "GaLore": "#cc79a7", "APOLLO": "#8c564b", "Adafactor": "#56b4e9", "Lion": "#e69f00",
    "Adam-mini": "#808000",
}  # fmt: skip
"""Colour of each optimizer, in every plot; levels differ by marker and line."""
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "gwt_kernels",  # else the identifiers within a file differ from run to run
}


def look_of(label: str) -> dict[str, Any]:
    """Return colour, marker and line of an optimizer by its name on the pages, such as "GWT-Muon level 2"."""
    names = [name for name in FAMILIES if re.search(rf"\b{name}\b", label)]
    level = int(found[1]) if (found := re.search(r"level (\d+)", label)) else 0
    level = len(MARKERS) - 1 if re.search(r"\brow\b", label) else level
    return {
        "color": FAMILIES[names[-1]] if names else PEER,
        "marker": MARKERS[level % len(MARKERS)],
        "linestyle": LINES[level % len(LINES)],
    }


class Plot(NamedTuple):
    """A plot's file name without suffix, its kind, and plain data."""

    name: str
    kind: str
    data: Any

    @property
    def digest(self) -> str:
        """Return a digest of the data and of this file.

        The picture contains it, and is stale if it differs. The picture's own bytes cannot be compared: they differ
        between versions of matplotlib.
        """
        content = json.dumps([self.kind, self.data], sort_keys=True) + Path(__file__).read_text()
        return hashlib.sha256(content.encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """Return the digest contained in a picture; None if there is no such picture."""
    found = re.search(r"drawn from ([0-9a-f]{64})", path.read_text()) if path.exists() else None
    return found[1] if found else None


def draw(plot: Plot, path: Path) -> None:
    """Draw a plot into an SVG file."""
    matplotlib.use("Agg")
    with rc_context(STYLE):
        figure = KINDS[plot.kind](plot.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None, "Description": f"drawn from {plot.digest}"}
        figure.savefig(path, format=path.suffix[1:], metadata=about if path.suffix == ".svg" else None, dpi=110)


def _steps(data: Any) -> Figure:
    """Draw the time of a step by optimizer, a panel per model; `data`: panels of title and entries."""
    times = {entry["label"]: entry["median"] for panel in data for entry in panel["entries"]}
    labels = sorted(times, key=lambda label: times[label])  # the fastest first, by the largest model
    figure = Figure(figsize=(2.6 + 2.4 * max(2, len(data)), 1.3 + 0.24 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
    for axes, panel in zip(panels, data, strict=True):
        for entry in panel["entries"]:
            y, colour = labels.index(entry["label"]), OWN if entry["own"] else PEER
            face = colour if entry["own"] else "white"
            axes.plot(1e3 * entry["median"], y, "o", markersize=5, color=colour, markerfacecolor=face, zorder=3)
            axes.plot([1e3 * entry["p20"], 1e3 * entry["p80"]], [y, y], color=colour, linewidth=1.5)
            if entry["roofline"] is not None:
                axes.plot(1e3 * entry["roofline"], y, "|", color=COLOURS[1], markersize=11, markeredgewidth=1.8)
        axes.set_title(panel["title"])
        axes.set_xlabel("ms per step")
        _decades(axes)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    own, peer = (
        panels[0].plot([], [], "o", color=colour, markerfacecolor=face, markersize=5)[0]
        for colour, face in ((OWN, OWN), (PEER, "white"))
    )
    roofline = panels[0].plot([], [], "|", color=COLOURS[1], markersize=11, markeredgewidth=1.8)[0]
    text = ["gwt_kernels", "others", "roofline: bytes that must move over bandwidth"]
    _legend_below(figure, [own, peer, roofline], text, columns=3)
    return figure


def _states(data: Any) -> Figure:
    """Draw the bytes of state by optimizer, a mark per model; `data`: caption, and models of title and entries."""
    models = data["models"]
    sizes = {label: size for model in models for label, size in model["entries"].items()}
    labels = sorted(sizes, key=lambda label: sizes[label])  # the smallest first, by the largest model
    width = max(7.4, 4.4 + 0.062 * max(map(len, labels)))
    figure = Figure(figsize=(width, 1.2 + 0.24 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(models):
        places = [labels.index(label) for label in model["entries"]]
        style = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "clip_on": False}
        axes.plot(list(model["entries"].values()), places, linestyle="none", label=model["title"], **style)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(data["what"], loc="right")  # in the middle of narrow axes it would be cut off
    _legend_below(figure, *axes.get_legend_handles_labels(), columns=5)
    return figure


def _roofline(data: Any) -> Figure:
    """Draw the share of the copy bandwidth by size, a panel per kernel; `data`: panels of title and series."""
    figure, panels, columns = _grid(len(data), width=3.4)
    # A series looks the same in every panel: colour and marker say the level, the line says the path.
    levels = sorted({series["level"] for panel in data for series in panel["series"]})
    paths = list(dict.fromkeys(series["path"] for panel in data for series in panel["series"]))
    own = [
        {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        for i in range(len(levels))
    ]
    for axes, panel in zip(panels, data, strict=False):
        for series in panel["series"]:
            sizes, shares = zip(*sorted(series["points"]), strict=True)
            shares = tuple(100 * share for share in shares)
            line = LINES[paths.index(series["path"]) % len(LINES)]
            axes.plot(sizes, shares, linestyle=line, linewidth=1, **own[levels.index(series["level"])])
        axes.axhline(100, color="#999999", linewidth=0.8)
        axes.set_title(panel["title"])
        axes.set_xscale("log", base=2)
    _label_lowest(panels, columns, len(data), "elements of the tensor")
    panels[0].set_ylim(bottom=0)
    figure.supylabel("per cent of copy bandwidth", fontsize=9)
    looks = [{**look, "linestyle": "none"} for look in own]
    text = [f"level {level}" for level in levels]
    for i, path in enumerate(paths if len(paths) > 1 else ()):
        looks.append({"color": "black", "linestyle": LINES[i % len(LINES)]})
        text.append(path)
    handles = [panels[0].plot([], [], linewidth=1.2, **look)[0] for look in looks]
    figure.legend(handles, text, loc="outside right upper")
    return figure


def _losses(data: Any) -> Figure:
    """Draw held-out loss against tokens; `data`: series of label, tokens, mean, low, high."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lowest = min(min(series["low"]) for series in data)
    ends = sorted(series["mean"][-1] for series in data)
    for series in data:
        look = look_of(series["label"])
        tokens = [count / 1e6 for count in series["tokens"]]
        axes.plot(tokens, series["mean"], label=series["label"], markersize=3.5, linewidth=1.3, **look)
        axes.fill_between(tokens, series["low"], series["high"], color=look["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("million tokens of training")
    axes.set_ylabel("held-out loss, nats per token")
    # The first evaluations are far above the rest; the end is to be compared.
    top = max(min(max(series["mean"]) for series in data), ends[-1] + 0.05)
    axes.set_ylim(lowest - 0.05 * (top - lowest), top)
    _legend_below(figure, *axes.get_legend_handles_labels(), columns=4)
    return figure


def _tradeoff(data: Any) -> Figure:
    """Draw held-out loss over bytes of state per parameter, a line per rule, the level beside each point.

    The area of a marker is the time of a step, if `ms` is known of any. `data`: points of label, rule, level, own,
    loss, low, high, bytes, ms.
    """
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[dict[str, Any]]] = {}
    for point in sorted(data, key=lambda point: point["bytes"]):
        series.setdefault(point["rule"] or point["label"], []).append(point)
    longest = max((point["ms"] for point in data if point.get("ms")), default=None)
    names = {_series_name(points[0]["label"]): points for points in series.values()}
    shown = {}
    for name, look in _series_looks(names).items():
        handle = {**look, "linewidth": 1.5, "linestyle": look["linestyle"] if names[name][0]["own"] else "none"}
        shown[name] = axes.plot([], [], markersize=6, **handle)[0]
        places = zip(*((point["bytes"], point["loss"]) for point in names[name]), strict=True)
        axes.plot(*places, color=look["color"], linestyle=look["linestyle"], linewidth=0.9, alpha=0.6)
        for point in names[name]:
            _tradeoff_point(axes, point, look, longest)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("bytes of optimizer state per parameter")
    axes.set_ylabel("held-out loss, nats per token")
    for ms in _round_times(data):
        size = math.sqrt(LARGEST * ms / (longest or ms))
        shown[f"{ms:g} ms a step"] = axes.plot([], [], "o", color="#777777", markersize=size)[0]
    if longest is not None and any(point.get("ms") is None for point in data):
        shown["not timed"] = axes.plot([], [], "x", color="#777777", markersize=6)[0]
    title = "filled: gwt_kernels"
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", title=title, labelspacing=0.8)
    return figure


LARGEST = 300.0
"""Area of the marker of the longest step, in square points."""


def _tradeoff_point(axes: Axes, point: dict[str, Any], look: dict[str, Any], longest: float | None) -> None:
    """Draw a point of the chart of loss and state: its marker, its range over seeds and its level."""
    x, y, ms = point["bytes"], point["loss"], point.get("ms")
    axes.plot([x, x], [point["low"], point["high"]], color=look["color"], linewidth=1.2)
    area = 64.0 if longest is None else 36.0 if ms is None else LARGEST * ms / longest
    if longest is not None and ms is None:
        axes.scatter([x], [y], s=area, marker="x", color=look["color"], zorder=3)
    else:
        colours = {"facecolors": look["color"] if point["own"] else "none", "edgecolors": look["color"]}
        axes.scatter([x], [y], s=area, marker=look["marker"], alpha=0.85, zorder=3, **colours)
    if point["own"]:
        offset = (math.sqrt(area) / 2 + 2, 3)
        axes.annotate(point["level"], (x, y), offset, textcoords="offset points", fontsize=7, color=look["color"])


def _series_looks(names: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the look of each series: its own marker and line, open for other packages' optimizers."""
    looks = {}
    own, others = ([name for name, points in names.items() if points[0]["own"] == mine] for mine in (True, False))
    for found, markers in ((own, MARKERS), (others, OPEN_MARKERS)):
        for i, name in enumerate(found):
            look = {"color": look_of(name)["color"], "marker": markers[i % len(markers)]}
            look |= {"markerfacecolor": look["color"] if name in own else "white"}
            looks[name] = {**look, "linestyle": LINES[i % len(LINES)]}
    return looks


def _series_name(label: str) -> str:
    return re.sub(r"^GWT-| (level \d|row)\b", "", label)


def _round_times(data: Any) -> list[float]:
    """Return up to three round times of a step between the shortest and the longest, for the legend."""
    times = [point["ms"] for point in data if point.get("ms")]
    if not times:
        return []
    wanted = (min(times), math.sqrt(min(times) * max(times)), max(times))
    return sorted({float(f"{ms:.0e}") for ms in wanted})


def _sweeps(data: Any) -> Figure:
    """Draw held-out loss by rate, momentum or scale, a panel per optimizer; `data`: what `x` is, what a line is
    `per`, and panels of title and lines.
    """
    what, per, data = data["x"], data["per"], data["panels"]
    figure, panels, columns = _grid(len(data), width=2.6)
    values = sorted({line["value"] for panel in data for line in panel["lines"]})
    shown: dict[float, Any] = {}
    losses = [loss for panel in data for line in panel["lines"] for loss in line["loss"]]
    top = min(max(losses), min(losses) + 0.5)  # diverged runs would flatten the rest
    for axes, panel in zip(panels, data, strict=False):
        for line in panel["lines"]:
            i = values.index(line["value"])
            look = {"marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)], "markersize": 4}
            look["color"] = scale_colour(line["value"]) if per == "scale" else COLOURS[i % len(COLOURS)]
            shown[line["value"]] = axes.plot(line["x"], line["loss"], linewidth=1.2, **look)[0]
        axes.set_title(panel["title"].replace(", ", ",\n"))
        if what != "momentum":
            axes.set_xscale("log")
        places = sorted({x for panel in data for line in panel["lines"] for x in line["x"]})
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.xaxis.set_minor_locator(NullLocator())
    _label_lowest(panels, columns, len(data), what)
    panels[0].set_ylim(min(losses) - 0.03 * (top - min(losses)), top + 0.03 * (top - min(losses)))
    figure.supylabel("held-out loss, nats per token", fontsize=9)
    text = [f"{per} {value:g}" for value in values]
    _legend_below(figure, [shown[value] for value in values], text, columns=6)
    return figure


SCALES = (0.0125, 2.4)
"""The lowest and the highest scale that has a colour of its own."""


def scale_colour(scale: float) -> str:
    """Return the colour of a scale, the same in every plot: from dark to light."""
    low, high = map(math.log, SCALES)
    place = min(max((math.log(scale) - low) / (high - low), 0.0), 1.0)
    return str(to_hex(matplotlib.colormaps["plasma"](0.88 * place)))  # without the yellow that vanishes on white


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Put a legend below all panels, in as many columns as fit into the picture, `columns` at the most.

    The picture grows by every row of it after the second.
    """
    for n in range(min(columns, len(labels)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=n)
        if n == 1 or legend.get_window_extent().width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.19 * max(0, math.ceil(len(labels) / n) - 2))
            return
        legend.remove()


def _grid(n: int, width: float) -> tuple[Figure, Sequence[Axes], int]:
    """Return a figure of at least `n` panels with shared axes, its panels, and the number of columns."""
    columns = n if n <= 3 else math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    figure = Figure(figsize=(max(6.4, 1.2 + width * columns), 0.9 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    return figure, list(panels.flatten()), columns


def _label_lowest(panels: Sequence[Axes], columns: int, filled: int, text: str) -> None:
    """Label the lowest panel of each column, and remove the empty panels."""
    for i, axes in enumerate(panels):
        if i >= filled:
            axes.set_axis_off()
        elif i + columns >= filled:
            axes.set_xlabel(text)
            axes.tick_params(labelbottom=True)


def _decades(axes: Axes) -> None:
    """Give a time axis a logarithmic scale with a few plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 1.6:
        low, high = low / 1.3, high * 1.3
        axes.set_xlim(low, high)
    ticks = (1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks) if high / low > 4 else MaxNLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


KINDS: dict[str, Callable[[Any], Figure]] = {
    "steps": _steps,
    "states": _states,
    "roofline": _roofline,
    "losses": _losses,
    "sweeps": _sweeps,
    "tradeoff": _tradeoff,
}

"""Plots as SVG files by matplotlib, one line per series; skipped where matplotlib is not installed."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farspan.tools.command import human

MAX_MARKERS = 40
"""Longer lines have no marker at each point."""
COLORS = 10
"""matplotlib's default colors; further lines are dashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """series: points by the name of their line. x, y: labels. log: logarithmic scales, x in powers of two."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    log: bool = False


def draw(plots: Mapping[str, Plot], folder: Path) -> list[Path]:
    """Draw plots by the names of their files; say so and draw none where matplotlib is not installed."""
    if plots and importlib.util.find_spec("matplotlib") is None:
        print("plots are skipped: matplotlib is not installed (pip install 'farspan[bench]')", file=sys.stderr)
        return []
    for name, plot in plots.items():
        _draw(plot, folder / name)
    return [folder / name for name in plots]


def _draw(plot: Plot, path: Path) -> None:
    # Imported here: a benchmark must not need it. Figure instead of pyplot: no window system, no global state.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    lines = {name: points for name, points in plot.series.items() if points}
    for number, (name, points) in enumerate(lines.items()):
        marker = "o" if len(points) <= MAX_MARKERS else ""
        style = "-" if number < COLORS else "--"
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.3, linestyle=style, label=name)
    if plot.log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [human(int(x)) for x in ticks], minor=False)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    # Text stays text, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "farspan"}):
        figure.savefig(path, format="svg", metadata={"Date": None})

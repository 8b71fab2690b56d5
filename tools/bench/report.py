"""Reports as files: records as JSON, the machine beside them, tables as Markdown, and plots as SVG by matplotlib."""

import datetime
import importlib.util
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from farspan.kernels.backend import BACKENDS
from farspan.tools.command import human
from farspan.versions import commit, version

ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]
"""Measured numbers as they are written to JSON; None where a row is not correct, or was not measured."""
MAX_MARKERS = 40
"""Longer lines have no marker at each point."""
COLORS = 10
"""matplotlib's default colors; further lines are dashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """series: points by the name of their line. x, y: labels. log: the logarithmic axes, x in powers of two."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    log: Literal["", "x", "xy"] = ""


def write_report(
    out: Path,
    *,
    title: str,
    machine: Mapping[str, str],
    notes: str,
    tables: Iterable[str],
    records: Sequence[Record] | None = None,
    sections: Mapping[str, Mapping[str, str]] | None = None,
    plots: Mapping[str, Plot] | None = None,
) -> list[Path]:
    """Write `out`.md, its plots and, if there are records, `out`.json and `out`_machine.json; return their paths.

    notes: how to read the tables. sections: bullets by heading, left out where there are none. plots: by suffix of
    their file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw({f"{out.name}{suffix}.svg": plot for suffix, plot in (plots or {}).items()}, out.parent)
    lines = [f"# {title}", "", *_bullets(machine), "", "## How to read the numbers", "", notes, *tables]
    for heading, bullets in (sections or {}).items():
        lines += [f"## {heading}", "", *_bullets(bullets), ""] if bullets else []
    images = [f"![{plot.title}]({path.name})\n" for plot, path in zip((plots or {}).values(), drawn, strict=False)]
    texts = {}
    if records is not None:
        texts = {".json": json.dumps(records, indent=1) + "\n", "_machine.json": json.dumps(machine, indent=1) + "\n"}
    texts[".md"] = "\n".join([*lines, *(["## Plots", "", *images] if images else [])])
    for suffix, text in texts.items():
        (out.parent / f"{out.name}{suffix}").write_text(text, encoding="utf-8")
    return [*(out.parent / f"{out.name}{suffix}" for suffix in texts), *drawn]


def _bullets(found: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in found.items()]


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = (columns, ["---"] * len(columns), *lines)
    return "".join(f"| {' | '.join(map(shown, cells))} |\n" for cells in rows)


def shown(value: object) -> str:
    """Return a number to three digits, and nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


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
        axes.set_yscale("log" if plot.log == "xy" else "linear")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [human(int(x)) for x in ticks], minor=False)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    # Text stays text, and the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "farspan"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def machine_facts(device: torch.device, tool: str, arguments: Sequence[str]) -> dict[str, str]:
    """Return the machine, the software, the commit and the command, in words."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"farspan.tools.{tool}", *arguments]),
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | {package: version(package) for package in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        found |= {"cudnn": str(torch.backends.cudnn.version()), "cuda_backend": BACKENDS.get("cuda").calls()}
    return found


def default_out(machine: dict[str, str], what: str) -> Path:
    """Return docs/benchmarks/DATE_DEVICE_WHAT in this checkout."""
    device = re.sub(r"[^a-z0-9]+", "_", processor(machine).lower()).strip("_")
    return ROOT / "docs" / "benchmarks" / f"{machine['date']}_{device}_{what}"


def processor(machine: dict[str, str]) -> str:
    """Return the GPU, or without one the CPU, of a machine's facts."""
    return machine.get("gpu") or machine["cpu"]


def cpu_model() -> str:
    """Return the model of the CPU, as Linux tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*\S)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()

"""Reports as files: records as JSON, the machine beside them, tables as Markdown, and plots."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farspan.tools.bench.plot import Plot, draw

Columns = Mapping[str, Callable[[Any], object]]
"""Cells of a row of a table, by the column's heading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """note: text between the heading and the table."""

    columns: Sequence[str]
    lines: Iterable[Sequence[object]]
    heading: str = ""
    note: str = ""

    @staticmethod
    def of_results(columns: Columns, results: Iterable[Any], keys: int, heading: str = "") -> "Table":
        """Return a table of results; a wrong row has the first columns, `keys` of them, and no number."""
        lines = []
        for result in results:
            measured = list(columns.values())[: keys if result.times is None else None]
            lines.append([cell(result) for cell in measured])
            if result.times is None:
                lines[-1] += ["not correct", *[None] * (len(columns) - keys - 1)]
        return Table(heading=heading, columns=list(columns), lines=lines)

    def markdown(self) -> Iterator[str]:
        yield _line(self.columns)
        yield _line(["---"] * len(self.columns))
        yield from map(_line, self.lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(shown, cells))} |"


def shown(value: object) -> str:
    """Return a number to three digits, and nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """notes: how to read the tables. records: none if None. checked: messages by row. plots: by suffix of the file."""

    title: str
    machine: Mapping[str, str]
    notes: str
    tables: Sequence[Table]
    records: Sequence[Mapping[str, object]] | None = None
    checked: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    plots: Mapping[str, Plot] = field(default_factory=dict)

    def write(self, out: Path) -> list[Path]:
        """Write `out`.json and `out`_machine.json if there are records, `out`.md and the plots; return their paths."""
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw({f"{out.name}{suffix}.svg": plot for suffix, plot in self.plots.items()}, out.parent)
        texts = {}
        if self.records is not None:
            texts["json"] = out.parent / f"{out.name}.json", json.dumps(list(self.records), indent=1) + "\n"
            texts["machine"] = out.parent / f"{out.name}_machine.json", json.dumps(dict(self.machine), indent=1) + "\n"
        images = dict(zip((plot.title for plot in self.plots.values()), (path.name for path in drawn), strict=False))
        texts["markdown"] = out.parent / f"{out.name}.md", self.markdown(images)
        for path, text in texts.values():
            path.write_text(text, encoding="utf-8")
        return [*(path for path, _ in texts.values()), *drawn]

    def markdown(self, images: Mapping[str, str]) -> str:
        """Return the report as Markdown; images: file names by title."""
        lines = [f"# {self.title}", "", *_bullets(self.machine), "", "## How to read the numbers", "", self.notes]
        for table in self.tables:
            lines += [f"## {table.heading}", ""] if table.heading else []
            lines += [table.note] if table.note else []
            lines += [*table.markdown(), ""]
        for heading, bullets in (("What was checked", self.checked), ("Left out", self.left_out)):
            lines += [f"## {heading}", "", *_bullets(bullets), ""] if bullets else []
        lines += ["## Plots", "", *(f"![{title}]({name})\n" for title, name in images.items())] if images else []
        return "\n".join(lines)


def _bullets(found: Mapping[str, str]) -> Iterator[str]:
    return (f"- {name}: {value}" for name, value in found.items())

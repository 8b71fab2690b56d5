"""The files of a measurement: records as JSON, the machine beside them, tables as Markdown, and a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farspan.tools.bench.attention import Record
from farspan.tools.bench.files import table_line, write_files
from farspan.tools.bench.plot import human, log_log
from farspan.tools.bench.run import LeftOut, Pair, Result
from farspan.tools.bench.timing import DIRECTIONS

MIB = 2**20
PLOTTED = "fwd_bwd"
COLUMNS = (
    "mechanism", "backend", "fwd ms", "bwd ms", "fwd+bwd ms", "least", "useful TFLOP/s", "speed-up over dense",
    "ideal", "of ideal", "peak MiB",
)  # fmt: skip
HOW = """Milliseconds are medians of 3 to {rounds} rounds (`least`: of fwd+bwd, the shortest); in each round every row
ran once, and a speed-up is the median of the rounds' ratios to dense causal attention over one document, by the
fastest of our backends. Useful FLOPs: products over visible pairs only, 2 forward and 5 backward. `ideal`: pairs that
dense attention sees over those that the mechanism sees. Speed-up, TFLOP/s and peak are of forward and backward
together; the peak is above the inputs. Every row was checked in the same run against float64, at the sizes listed
below: a row without numbers failed, and its numbers would mean nothing.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that was found in a run. memory: bytes by pair, at each of memory_sizes."""

    machine: Mapping[str, str]
    pairs: Sequence[Pair]
    results: Sequence[Result]
    records: Sequence[Record]
    left_out: LeftOut
    rounds: int
    memory_sizes: Sequence[int]
    memory: Mapping[str, Sequence[int]]


def write(report: Report, out: Path) -> list[Path]:
    """Write `out`.json, `out`_machine.json, `out`.md and `out`.svg; return their paths."""
    texts = {
        f"{out.name}.json": json.dumps([record.as_dict() for record in report.records], indent=1) + "\n",
        f"{out.name}_machine.json": json.dumps(dict(report.machine), indent=1) + "\n",
        f"{out.name}.md": markdown(report, plot=f"{out.name}.svg"),
        f"{out.name}.svg": log_log(series(report.records), _title(report)),
    }
    return write_files(out.parent, texts)


def series(records: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    """Return the lines of the plot: milliseconds forward and backward of each mechanism and backend."""
    backends = {record.backend for record in records}
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.direction == PLOTTED and record.ms is not None:
            name = record.mechanism if len(backends) == 1 else f"{record.mechanism}, {record.backend}"
            lines.setdefault(name, []).append((record.tokens, record.ms))
    return lines


def markdown(report: Report, *, plot: str) -> str:
    """Return the report as Markdown; `plot` is the name of the image beside it."""
    lines = [f"# {_title(report)}", "", *(f"- {name}: {value}" for name, value in report.machine.items()), ""]
    lines += [f"![time against tokens]({plot})", "", HOW.format(rounds=report.rounds)]
    for tokens in dict.fromkeys(result.tokens for result in report.results):
        lines += [f"## {human(tokens)} tokens", "", *_table(report, tokens), ""]
    if report.memory:
        lines += ["## Peak memory, forward and backward", "", *_memory_table(report), ""]
    lines += ["## What was checked", "", *(f"- {pair.name}: {pair.verdict.said}" for pair in report.pairs), ""]
    if report.left_out.reasons:
        lines += ["## Left out", "", *(f"- {what}: {why}" for what, why in report.left_out.reasons.items()), ""]
    return "\n".join(lines)


def _title(report: Report) -> str:
    device = report.machine.get("gpu") or report.machine["cpu"]
    first = report.records[0] if report.records else None
    shape = f", {first.heads}:{first.kv_heads} heads of {first.head_dim}, {first.dtype}" if first else ""
    return f"Attention, forward and backward: {device}{shape}"


def _table(report: Report, tokens: int) -> Iterator[str]:
    yield table_line(COLUMNS)
    yield table_line(["---"] * len(COLUMNS))
    least = {
        (result.pair.case.name, result.pair.contender.name): result.times.least(PLOTTED)
        for result in report.results
        if result.tokens == tokens and result.times is not None
    }
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in report.records:
        if record.tokens == tokens:
            rows.setdefault((record.mechanism, record.backend), {})[record.direction] = record
    for key, row in rows.items():
        both = row[PLOTTED]
        if not both.correct:
            yield table_line([*key, "not correct", *[""] * (len(COLUMNS) - 3)])
            continue
        cells = [*(_number(row[direction].ms) for direction in DIRECTIONS), _number(least[key])]
        cells += [_number(both.useful_tflops), _number(both.speedup_over_dense), _number(both.ideal_speedup)]
        cells.append("" if both.fraction_of_ideal is None else f"{both.fraction_of_ideal:.0%}")
        cells.append("" if both.peak_bytes is None else f"{both.peak_bytes / MIB:,.0f}")
        yield table_line([*key, *cells])


def _memory_table(report: Report) -> Iterator[str]:
    """Peaks in MiB, and how often the first fits into the last, beside how often the tokens do."""
    sizes = report.memory_sizes
    yield table_line(["", *(f"{human(tokens)} MiB" for tokens in sizes), f"growth (tokens: {sizes[-1] / sizes[0]:g})"])
    yield table_line(["---"] * (len(sizes) + 2))
    for name, peaks in report.memory.items():
        cells = [f"{peak / MIB:,.0f}" for peak in peaks] + [""] * (len(sizes) - len(peaks))
        whole = len(peaks) == len(sizes) and peaks[0] > 0
        yield table_line([name, *cells, f"{peaks[-1] / peaks[0]:.1f}" if whole else ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

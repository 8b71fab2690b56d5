"""The files of a measurement: records as JSON, the machine beside them, tables as Markdown, and a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farspan.tools.bench.case import BASELINE
from farspan.tools.bench.check import Verdict
from farspan.tools.bench.context import Overlap, Result, rate, ratio
from farspan.tools.bench.context_contenders import SINGLE, Row
from farspan.tools.bench.plot import human, log_log
from farspan.tools.bench.run import LeftOut

MIB = 2**20
COLUMNS = (
    "strategy", "layout", "ranks", "tokens/s", "fwd ms", "bwd ms", "of one rank, as many threads", "MiB sent",
    "MiB by formula", "balance", "peak MiB",
)  # fmt: skip
HOW = """Ranks are processes of one thread each, over {backend}. Milliseconds are medians of {rounds} rounds, of the
slowest rank, forward and backward each begun when all were ready; in each round every row of a table ran once. `of one
rank, as many threads`: tokens/s over those of one process with as many threads as there are ranks, the median of the
rounds' ratios. Bytes are those that the rank with most sends, forward and backward, as its channel counted them and as
the strategy's formula says; a * marks rows where they differ on some rank. `balance`: pairs of queries and keys of the
busiest rank over the mean; where content decides, those that may be seen. The peak, of the rank with most, is above its
inputs. Every row was checked in the same run against one process in float64, at the sizes listed below: out and
gradients of all ranks put together. A row without numbers failed, and its numbers would mean nothing.
"""
OVERLAP = """Each transfer of {strategy} ({layout}, {mechanism}, {tokens} tokens) is complete no earlier than a delay
after its sender started it; senders do not wait. A step is what a rank computes between two hops: the time without
delay over the number of ranks. `longer of both`: as it should be if transfers are hidden behind computing, `sum`: if
they are not; backward, the last gradient comes home when there is nothing left to compute, in both.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """bytes_sent, bytes_formula, peak_bytes: of the rank with most. Numbers are None where they are not known.

    tokens_per_s: forward and backward. balance: the work of the busiest rank over the mean.
    """

    strategy: str
    layout: str
    mechanism: str
    degree: int
    tokens: int
    tokens_per_s: float | None
    bytes_sent: int | None
    bytes_formula: int | None
    balance: float | None
    peak_bytes: int | None

    @staticmethod
    def of(result: Result) -> "Record":
        row = result.row
        return Record(
            strategy=row.strategy,
            layout=row.layout,
            mechanism=row.case.name,
            degree=row.degree,
            tokens=result.tokens,
            tokens_per_s=None if result.times is None else rate(result.tokens, result.times),
            bytes_sent=result.sent,
            bytes_formula=result.stated,
            balance=result.balance,
            peak_bytes=result.peak,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapRun:
    """The times of a ring with late transfers, and of what."""

    row: Row
    tokens: int
    found: Sequence[Overlap]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that was found in a run. late_ms: delay of every transfer of the tables."""

    machine: Mapping[str, str]
    shape: str
    judged: Sequence[tuple[Row, Verdict]]
    results: Sequence[Result]
    overlap: Sequence[OverlapRun]
    left_out: LeftOut
    rounds: int
    late_ms: float


def write(report: Report, out: Path) -> list[Path]:
    """Write `out`.json, `out`_machine.json, `out`.md and `out`.svg; return their paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    records = [asdict(Record.of(result)) for result in report.results]
    case, tokens = _plotted(report.results)
    title = f"{_title(report)}: {case}, {human(tokens)} tokens"
    lines = series(report.results, case, tokens)
    texts = {
        f"{out.name}.json": json.dumps(records, indent=1) + "\n",
        f"{out.name}_machine.json": json.dumps(dict(report.machine), indent=1) + "\n",
        f"{out.name}.md": markdown(report, plot=f"{out.name}.svg"),
        f"{out.name}.svg": log_log(lines, title, x_label="ranks", y_label="tokens/s"),
    }
    for name, text in texts.items():
        (out.parent / name).write_text(text, encoding="utf-8")
    return [out.parent / name for name in texts]


def _plotted(results: Sequence[Result]) -> tuple[str, int]:
    """Return the mechanism and the size of the plot: dense, if it was measured, and the longest."""
    measured = [result for result in results if result.times is not None]
    names = {result.row.case.name for result in measured}
    case = BASELINE if BASELINE in names or not measured else measured[0].row.case.name
    return case, max((result.tokens for result in measured if result.row.case.name == case), default=0)


def series(results: Sequence[Result], case: str, tokens: int) -> dict[str, list[tuple[int, float]]]:
    """Return the lines of the plot: tokens per second by ranks, of one rank by threads."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        row = result.row
        if result.times is not None and row.case.name == case and result.tokens == tokens:
            name = "one rank, threads" if row.entrant.name == SINGLE else f"{row.strategy}, {row.layout}"
            lines.setdefault(name, []).append((row.degree * row.threads, rate(tokens, result.times)))
    return lines


def markdown(report: Report, *, plot: str) -> str:
    """Return the report as Markdown; `plot` is the name of the image beside it."""
    lines = [f"# {_title(report)}", "", *(f"- {name}: {value}" for name, value in report.machine.items()), ""]
    backend = "NCCL" if "gpu" in report.machine else "gloo"
    lines += [f"![tokens/s against ranks]({plot})", "", HOW.format(rounds=report.rounds, backend=backend)]
    if report.late_ms:
        lines += [
            f"Every transfer of the tables is complete no earlier than {report.late_ms:g} ms after its start.",
            "",
        ]
    for case, tokens in dict.fromkeys((result.row.case.name, result.tokens) for result in report.results):
        lines += [f"## {case}, {human(tokens)} tokens", "", *_table(report.results, case, tokens), ""]
    for run in report.overlap:
        row = run.row
        said = OVERLAP.format(
            strategy=row.strategy, layout=row.layout, mechanism=row.case.name, tokens=human(run.tokens)
        )
        lines += [f"## Overlap, {row.degree} ranks", "", said, *_overlap_table(run.found), ""]
    lines += ["## What was checked", "", *(f"- {row.name}: {verdict.said}" for row, verdict in report.judged), ""]
    if report.left_out.reasons:
        lines += ["## Left out", "", *(f"- {what}: {why}" for what, why in report.left_out.reasons.items()), ""]
    return "\n".join(lines)


def _title(report: Report) -> str:
    return f"Context parallelism, {report.machine.get('gpu') or report.machine['cpu']}, {report.shape}"


def _table(results: Sequence[Result], case: str, tokens: int) -> Iterator[str]:
    yield _line(COLUMNS)
    yield _line(["---"] * len(COLUMNS))
    for result in results:
        row = result.row
        if (row.case.name, result.tokens) != (case, tokens):
            continue
        key = [row.strategy, row.layout, str(row.degree)]
        if not result.verdict.correct or result.times is None:
            yield _line([*key, "not correct", *[""] * (len(COLUMNS) - 4)])
            continue
        cells = [_number(rate(tokens, result.times))]
        cells += [_number(result.times.median(direction)) for direction in ("fwd", "bwd")]
        cells += [_number(ratio(result)), f"{_mib(result.sent)}{'*' if result.differs else ''}", _mib(result.stated)]
        cells += ["" if result.balance is None else f"{result.balance:.2f}", _mib(result.peak)]
        yield _line([*key, *cells])


def _overlap_table(found: Sequence[Overlap]) -> Iterator[str]:
    columns = ("pass", "step ms", "delay ms", "measured ms", "longer of both", "sum", "over the longer of both")
    yield _line(columns)
    yield _line(["---"] * len(columns))
    for one in found:
        numbers = (one.step_ms, one.late_ms, one.ms, one.hidden_ms, one.exposed_ms, one.ms / one.hidden_ms)
        yield _line([one.direction, *map(_number, numbers)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

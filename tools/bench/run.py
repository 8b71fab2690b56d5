"""A benchmark's run, the same for all kinds: check every row, then time those that are correct in rounds."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from farspan.errors import FarspanError
from farspan.tools.bench.check import Verdict, first_line
from farspan.tools.bench.plot import Plot
from farspan.tools.bench.report import Report, Table
from farspan.tools.bench.timing import Pass, Times
from farspan.tools.command import human

FEWEST_ROUNDS = 3
ATTEMPT_ERRORS = (FarspanError, ValueError, RuntimeError)
"""A row that raises one of them, for want of memory perhaps, is left out."""

Record = dict[str, Any]
"""Measured numbers as they are written to JSON; None where a row is not correct, or was not measured."""


class Row(Protocol):
    """A row of the tables: a contender with its work."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result(Generic[R]):
    """Measurements of a row at one size. baseline: times in the same rounds that speed-ups refer to.

    needs: memory, bytes sent and the like, as the kind of benchmark measures them. records: for JSON.
    """

    row: R
    verdict: Verdict
    size: int
    times: Times | None = None
    baseline: Sequence[Times] = ()
    needs: Any = None
    records: Sequence[Record] = ()

    def speedups(self, direction: str) -> list[float]:
        """Return the ratios of the fastest baseline's time to this one's, round by round; none without a baseline."""
        if self.times is None or not self.baseline:
            return []
        fastest = min(self.baseline, key=lambda times: times.median(direction))
        return self.times.ratios_to(fastest, direction)

    def speedup(self, direction: str) -> float | None:
        """Return the median of the rounds' ratios, if there is a baseline."""
        ratios = self.speedups(direction)
        return statistics.median(ratios) if ratios else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """rounds: of timing, fewer where they would take over rounds_s. row_s: no row is started that would take longer.

    deadline: of `time.monotonic`; nothing is started that would end later. rounds_until: after it the rounds end, once
    FEWEST_ROUNDS have run.
    """

    rounds: int
    rounds_s: float = float("inf")
    row_s: float = float("inf")
    deadline: float = float("inf")
    rounds_until: float = float("inf")

    def reason_to_skip(self, pass_s: float | None) -> str:
        """Return why a row whose pass takes so long, if that is known, is not started; or nothing."""
        if time.monotonic() + FEWEST_ROUNDS * (pass_s or 0.0) > self.deadline:
            return "the time budget is used up"
        if pass_s is not None and pass_s > self.row_s:
            return f"a forward and backward pass would take {pass_s:.0f} s, over the limit of {self.row_s:.0f} s"
        return ""

    def rounds_of(self, round_s: float) -> int:
        """Return how many rounds to run if one takes so long."""
        fitting = self.rounds_s / max(round_s, 1e-9)
        return max(FEWEST_ROUNDS, int(min(self.rounds, fitting)))


class Bench(ABC, Generic[R]):
    """A kind of benchmark: how its rows are checked, run and measured, and what was found so far.

    checked: rows that claim to compute their case, by name. left_out: reasons by the name of a row.
    """

    def __init__(self) -> None:
        self.checked: dict[str, tuple[R, Verdict]] = {}
        self.results: list[Result[R]] = []
        self.left_out: dict[str, str] = {}
        self._shared: dict[object, Any] = {}

    @abstractmethod
    def check(self, row: R) -> Verdict:
        """Compare a row with the truth."""

    @abstractmethod
    def start(self, row: R, size: int) -> Pass:
        """Prepare a row's pass and warm it up; raises one of ATTEMPT_ERRORS where that fails."""

    @abstractmethod
    def is_baseline(self, other: R, row: R) -> bool:
        """Whether speed-ups of `row` refer to `other`."""

    @abstractmethod
    def records(self, result: Result[R]) -> list[Record]:
        """Return the records of a result."""

    def work(self, row: R, size: int) -> float:
        """Return what a row's time is proportional to."""
        return 1.0

    def shared(self, key: object, make: Callable[[], Any]) -> Any:
        """Return a value that the passes of one size share, made by the first that needs it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def release(self) -> None:
        """Drop what `start` prepared."""
        self._shared.clear()

    def needs(self, row: R, size: int) -> Any:
        """Measure what a pass needs besides time."""
        return None

    def leave_out(self, what: str, reason: str) -> None:
        self.left_out.setdefault(what, reason)

    def refuse(self, row: R, verdict: Verdict) -> None:
        """Report a row that does not claim to compute its case."""
        self.leave_out(row.name, verdict.message)

    def check_all(self, rows: Iterable[R]) -> dict[str, tuple[R, Verdict]]:
        """Return the rows that claim to compute their case by name, with their verdicts; print those."""
        checked: dict[str, tuple[R, Verdict]] = {}
        for row in rows:
            verdict = self.check(row)
            if verdict.refused:
                self.refuse(row, verdict)
                continue
            checked[row.name] = row, verdict
            print(f"{row.name}: {'correct' if verdict.correct else f'NOT CORRECT: {verdict.message}'}", flush=True)
        self.checked |= checked
        return checked

    def measure(self, checked: Mapping[str, tuple[R, Verdict]], sizes: Iterable[int], limits: Limits) -> None:
        """Add the results of all sizes: of wrong rows without a number, and of those that were measured."""
        rates: dict[str, float] = {}
        for size in sorted(sizes):
            rows = {name: row for name, (row, verdict) in checked.items() if verdict.correct}
            pass_s = {name: rates[name] * self.work(row, size) for name, row in rows.items() if name in rates}
            times = self._rounds(rows, pass_s, size, limits)
            for name, (row, verdict) in checked.items():
                result = Result(row=row, verdict=verdict, size=size)
                if name in times:
                    result = self._result(row, verdict, size, rows, times, limits)
                    rates[name] = times[name].median("fwd_bwd") / 1e3 / max(self.work(row, size), 1)
                if name in times or not verdict.correct:
                    self.results.append(replace(result, records=self.records(result)))

    def _rounds(
        self, rows: Mapping[str, R], pass_s: Mapping[str, float], size: int, limits: Limits
    ) -> dict[str, Times]:
        """Return the times of each row by name; one that dies is left out from there on."""
        passes: dict[str, Pass] = {}
        for name, row in rows.items():
            reason = limits.reason_to_skip(pass_s.get(name))
            try:
                if not reason:
                    passes[name] = self.start(row, size)
            except ATTEMPT_ERRORS as error:
                reason = first_line(error)
            if reason:
                self.leave_out(f"{name}, {human(size)} tokens", reason)
        times = {name: Times() for name in passes}
        for number in range(limits.rounds_of(sum(pass_s.get(name, 0.0) for name in passes))):
            if number >= FEWEST_ROUNDS and time.monotonic() > limits.rounds_until:
                break
            for name in list(times):
                try:
                    times[name].add(*passes[name]())
                except ATTEMPT_ERRORS as error:
                    self.leave_out(f"{name}, {human(size)} tokens", first_line(error))
                    del times[name]
        self.release()
        return times

    def _result(
        self, row: R, verdict: Verdict, size: int, rows: Mapping[str, R], times: Mapping[str, Times], limits: Limits
    ) -> Result[R]:
        own = times[row.name]
        ms = own.median("fwd_bwd")
        print(f"{human(size):>6} {row.name:<60}{ms:12.2f} ms", flush=True)
        return Result(
            row=row,
            verdict=verdict,
            size=size,
            times=own,
            baseline=[times[name] for name, other in rows.items() if name in times and self.is_baseline(other, row)],
            needs=None if limits.reason_to_skip(ms / 1e3) else self.needs(row, size),
        )

    def report_with(
        self, machine: Mapping[str, str], *, title: str, notes: str, tables: Sequence[Table], plot: Plot | None = None
    ) -> Report:
        """Return the report of everything that was found."""
        return Report(
            title=title,
            machine=machine,
            notes=notes,
            tables=tables,
            records=[record for result in self.results for record in result.records],
            checked={name: verdict.message for name, (_, verdict) in self.checked.items()},
            left_out=self.left_out,
            plots={} if plot is None else {"": plot},
        )

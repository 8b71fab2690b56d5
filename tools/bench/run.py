"""A benchmark's run, the same for all kinds: check every row, then time those that are correct in rounds.

Every row runs once per round, so that all meet the same ups and downs of the machine.
"""

import contextlib
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from farspan.errors import FarspanError
from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import Verdict, first_line, outcome
from farspan.tools.bench.contenders import Contender
from farspan.tools.bench.report import Plot, Record, markdown_table, write_report
from farspan.tools.command import human

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
FEWEST_ROUNDS = 3
ATTEMPT_ERRORS = (FarspanError, ValueError, RuntimeError)
"""A row that raises one of them, for want of memory perhaps, is left out."""

WARM_UP_TOKENS = 64
STATUS = Path("/proc/self/status")

Pass = Callable[[], tuple[float, float]]
"""Runs a forward and a backward pass; returns their milliseconds."""
Peaks = dict[str, int]
"""Bytes by direction, above the memory in use before: above the inputs; backward above what forward left, too."""


class Times(list[tuple[float, float]]):
    """Milliseconds of each round, forward and backward."""

    def of(self, direction: str) -> list[float]:
        """Return the milliseconds of each round in one of DIRECTIONS."""
        return [{"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd}[direction] for fwd, bwd in self]

    def median(self, direction: str) -> float:
        return statistics.median(self.of(direction))


class Row(Protocol):
    """A row of the tables: a contender with its work."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Row)


@dataclass(kw_only=True, slots=True, eq=False)
class Result(Generic[R]):
    """Measurements of a row at one size; `times` is None where it is wrong.

    baseline: times in the same rounds that speed-ups refer to. needs: memory, bytes sent and the like, as the kind of
    benchmark measures them. records: for JSON.
    """

    row: R
    verdict: Verdict
    size: int
    times: Times | None = None
    baseline: Sequence[Times] = ()
    needs: Any = None
    records: Sequence[Record] = ()

    def ms(self, direction: str) -> float | None:
        return None if self.times is None else self.times.median(direction)

    def speedups(self, direction: str) -> list[float]:
        """Return the ratios of the fastest baseline's time to this one's; none without a baseline.

        Round by round: a slow round slows both and does not count.
        """
        if self.times is None or not self.baseline:
            return []
        fastest = min(self.baseline, key=lambda times: times.median(direction))
        return [x / y for x, y in zip(fastest.of(direction), self.times.of(direction), strict=True)]

    def speedup(self, direction: str) -> float | None:
        """Return the median of the rounds' ratios, if there is a baseline."""
        ratios = self.speedups(direction)
        return statistics.median(ratios) if ratios else None


Columns = Mapping[str, Callable[[Any], object]]
"""Cells of a result's line of a table, by the column's heading."""
TIMES: Columns = {
    "forward ms": lambda result: result.ms("fwd"),
    "backward ms": lambda result: result.ms("bwd"),
    "both ms": lambda result: result.ms("fwd_bwd"),
    "shortest ms": lambda result: min(result.times.of("fwd_bwd")),
}


def results_table(columns: Columns, results: Iterable[Result[Any]], keys: int) -> str:
    """Return a table of results; a wrong row has the first columns, `keys` of them, and no number."""
    lines = []
    for result in results:
        lines.append([cell(result) for cell in list(columns.values())[: keys if result.times is None else None]])
        if result.times is None:
            lines[-1] += ["not correct", *[None] * (len(columns) - keys - 1)]
    return markdown_table(list(columns), lines)


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
        return max(FEWEST_ROUNDS, int(min(self.rounds, self.rounds_s / max(round_s, 1e-9))))


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
    def records(self, result: Result[R]) -> list[Record]: ...

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

    def refuse(self, row: R, verdict: Verdict) -> None:
        """Report a row that does not claim to compute its case."""
        self.left_out.setdefault(row.name, verdict.message)

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
        rows = {name: row for name, (row, verdict) in checked.items() if verdict.correct}
        rates: dict[str, float] = {}
        for size in sorted(sizes):
            pass_s = {name: rates[name] * self.work(row, size) for name, row in rows.items() if name in rates}
            times = self._rounds(rows, pass_s, size, limits)
            for name, (row, verdict) in checked.items():
                if name in rows and name not in times:
                    continue
                result = Result(row=row, verdict=verdict, size=size, times=times.get(name))
                if name in times:
                    ms = times[name].median("fwd_bwd")
                    print(f"{human(size):>6} {name:<60}{ms:12.2f} ms", flush=True)
                    rates[name] = ms / 1e3 / max(self.work(row, size), 1)
                    result.baseline = [found for other, found in times.items() if self.is_baseline(rows[other], row)]
                    result.needs = None if limits.reason_to_skip(ms / 1e3) else self.needs(row, size)
                result.records = self.records(result)
                self.results.append(result)

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
                self.left_out.setdefault(f"{name}, {human(size)} tokens", reason)
        times = {name: Times() for name in passes}
        for number in range(limits.rounds_of(sum(pass_s.get(name, 0.0) for name in passes))):
            if number >= FEWEST_ROUNDS and time.monotonic() > limits.rounds_until:
                break
            for name in list(times):
                try:
                    times[name].append(passes[name]())
                except ATTEMPT_ERRORS as error:
                    self.left_out.setdefault(f"{name}, {human(size)} tokens", first_line(error))
                    del times[name]
        self.release()
        return times

    def write(
        self, out: Path, machine: Mapping[str, str], *, title: str, notes: str, tables: Iterable[str], plot: Plot | None
    ) -> list[Path]:
        """Write everything that was found; return the paths of the files."""
        checked = {name: verdict.message for name, (_, verdict) in self.checked.items()}
        return write_report(
            out,
            title=title,
            machine=machine,
            notes=notes,
            tables=tables,
            records=[record for result in self.results for record in result.records],
            sections={"What was checked": checked, "Left out": self.left_out},
            plots={} if plot is None else {"": plot},
        )


def warm_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor, warm_ups: int) -> Pass:
    for _ in range(warm_ups):
        time_once(attention, inputs, dout)
    return partial(time_once, attention, inputs, dout)


def time_once(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> tuple[float, float]:
    """Return the milliseconds of one forward and one backward pass."""
    ticks: list[Any] = []

    def tick() -> None:
        ticks.append(torch.cuda.Event(enable_timing=True) if dout.is_cuda else time.perf_counter())
        if dout.is_cuda:
            ticks[-1].record()

    if dout.is_cuda:
        torch.cuda.synchronize()
    tick()
    out = attention(*inputs)
    tick()
    torch.autograd.grad(out, inputs, dout)
    tick()
    begun, between, done = ticks
    if not dout.is_cuda:
        return 1e3 * (between - begun), 1e3 * (done - between)
    torch.cuda.synchronize()
    return begun.elapsed_time(between), between.elapsed_time(done)


def peaks_of_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> Peaks | None:
    """Run one pass in this process; return its peaks, or None where the system does not report memory.

    CUDA: by torch's allocator. CPU: by the system's count of resident pages (Linux only), where memory freed before
    hides what the pass needs.
    """
    if not dout.is_cuda and not STATUS.exists():
        outcome(attention, inputs, dout)
        return None
    before = reset_peak(dout.device)
    out = attention(*inputs)
    forward = peak(dout.device) - before
    between = reset_peak(dout.device)
    gradients = torch.autograd.grad(out, inputs, dout)
    backward = peak(dout.device) - between
    del gradients
    return {"fwd": forward, "bwd": backward, "fwd_bwd": max(forward, backward + between - before)}


def peaks_of_case(contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks | None:
    attention = contender.plan(case.mechanism, case.rows(tokens), shape)
    return peaks_of_pass(attention, inputs_of(case.mechanism, tokens, shape), gradient_of_out(tokens, shape))


def peaks_in_fresh_process(worker: object, contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks | None:
    peaks_of_case(contender, case, WARM_UP_TOKENS, shape)  # loads libraries and their workspaces
    return peaks_of_case(contender, case, tokens, shape)


def reset_peak(device: torch.device) -> int:
    """Return the bytes in use; peaks count from now on."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # where a sandbox forbids it, peaks count from the start of the process
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    return _resident_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (highest since start or reset) of this process."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))

"""The benchmark of context parallelism: strategies, layouts and mechanisms over ranks, beside one rank."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Self, final

import torch

from farspan.errors import ConfigError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.tools.bench import on_rank
from farspan.tools.bench.case import Case, Shape
from farspan.tools.bench.check import SLACK, Check, Checker, Run, Verdict, first_line
from farspan.tools.bench.context_contenders import SINGLE, ContextContender, ContextRow, StrategyContender
from farspan.tools.bench.on_rank import worker_pool
from farspan.tools.bench.plot import Plot
from farspan.tools.bench.report import Report, Table, mib
from farspan.tools.bench.run import Bench, Record, Result
from farspan.tools.bench.timing import Pass, Times
from farspan.tools.command import human
from farspan.tools.rank_pool import RankError, RankPool

OVERLAPPED = "ring"
"""The strategy whose transfers are delayed, to show that they overlap with computing."""
DELAYS = (0.0, 0.5, 1.0, 2.0)
"""Delays of transfers over the time of a step's computing."""
NOTES = """Ranks are processes of one thread each, over {backend}. Milliseconds are medians of {rounds} rounds, of the
slowest rank; forward and backward each begin when all ranks are ready, and every row of a table runs once per round.
`speed over one rank` compares tokens/s with one process that has as many threads as there are ranks: the median of the
rounds' ratios. Bytes are those of the rank that sends most, forward and backward, as its channel counted them and as
the strategy's formula states them; a * marks rows where the two differ on some rank. `balance` is the number of pairs
of queries and keys of the busiest rank over the mean; where content decides, of the pairs that may be unmasked. The
peak, of the rank with most, is above its inputs. Every row was checked in the same run against one process in float64,
at the sizes listed below: out and gradients of all ranks put together. A row without numbers failed: its numbers would
mean nothing.
"""
DELAYED = "Every transfer of the tables completes no earlier than {delay_ms:g} ms after its start.\n"
OVERLAP = """Each transfer of {strategy} ({layout}, {mechanism}, {tokens} tokens) completes no earlier than a delay
after its sender started it; senders do not wait. A step is a rank's computing between two hops: the time without delay
over the number of ranks. `overlapped` is the time if transfers overlap with computing, the longer of both; `exposed`
is the time if they do not, their sum. Backward, the last gradient arrives after all computing, in both.
"""


def _most(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


@final
class ContextBench(Bench[ContextRow]):
    """Rows that run on pools of ranks. delay_s: of every transfer."""

    def __init__(self, shape: Shape, delay_s: float = 0.0) -> None:
        super().__init__()
        self.shape, self.delay_s = shape, delay_s
        self._checker = Checker(shape)
        self._pools: dict[tuple[int, int], RankPool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.stop()

    def pool(self, row: ContextRow) -> RankPool:
        """Return the pool that a row runs on, started at its first call."""
        size = row.degree, row.threads
        if size not in self._pools:
            self._pools[size] = worker_pool(*size, self.shape.device.type)
        return self._pools[size]

    def rows(
        self, case: Case, contenders: Sequence[ContextContender], layouts: Sequence[str], degrees: Sequence[int]
    ) -> list[ContextRow]:
        """Return the rows of a case that their contenders support, and leave out the others; first those of one rank.

        On CPUs also one rank with as many threads as there are ranks in others.
        """
        single, heads = StrategyContender(SINGLE, STRATEGIES.get(SINGLE)), self.shape.heads
        rows = [
            ContextRow(contender=single, case=case, layout="contiguous", degree=1, threads=threads)
            for threads in dict.fromkeys((1, *(degrees if self.shape.device.type == "cpu" else ())))
        ]
        for degree, contender, layout in product(degrees, contenders, layouts):
            row = ContextRow(contender=contender, case=case, layout=layout, degree=degree)
            if contender.is_baseline and self.delay_s:
                self.leave_out(contender.name, "its transfers cannot be delayed from outside.")
            elif reason := contender.unsupported_reason(case.mechanism, layout, heads, degree):
                self.leave_out(row.name, reason)
            else:
                rows.append(row)
        return rows

    def check(self, row: ContextRow) -> Verdict:
        slack, packed = SLACK if row.contender.is_baseline else 1.0, row.contender.packed
        verdict = self._checker.check(row.setting, row.case, partial(self._plan, row), packed=packed, slack=slack)
        # A baseline that dies is left out; a strategy of ours that dies is wrong.
        return replace(verdict, refused=True) if verdict.crashed and row.contender.is_baseline else verdict

    def _plan(self, row: ContextRow, check: Check) -> Run:
        if reason := row.contender.unsupported_reason(check.mechanism, row.layout, check.shape.heads, row.degree):
            raise ConfigError(reason)
        return partial(self._run, row, check)

    def _run(self, row: ContextRow, check: Check) -> list[torch.Tensor]:
        """Return what the ranks compute, put together."""
        ranks = self.pool(row).run(on_rank.check, row, check)
        shards = row.shards(check.mechanism, check.rows)
        return [shards.unshard(torch.stack(parts)).to(check.shape.device) for parts in zip(*ranks, strict=True)]

    def start(self, row: ContextRow, size: int) -> Pass:
        return partial(self._time, row, size, (self.delay_s, self.delay_s))

    def _time(self, row: ContextRow, size: int, delays_s: tuple[float, float]) -> tuple[float, float]:
        """Time a pass: it takes as long as its slowest rank."""
        forward, backward = zip(*self.pool(row).run(on_rank.time_pass, row, size, self.shape, delays_s), strict=True)
        return max(forward), max(backward)

    def release(self) -> None:
        for pool in self._pools.values():
            pool.run(on_rank.forget)

    def is_baseline(self, other: ContextRow, row: ContextRow) -> bool:
        return other.contender.name == SINGLE and other.threads == row.degree > 1

    def needs(self, row: ContextRow, size: int) -> Record:
        """Measure memory and bytes in fresh processes; the numbers of the rank with most."""
        try:
            with worker_pool(row.degree, row.threads, self.shape.device.type) as pool:
                ranks = pool.run(on_rank.measure, row, size, self.shape)
        except RankError as error:
            self.leave_out(f"memory and bytes of {row.name}, {human(size)} tokens", first_line(error))
            return {}
        work = [needs.work for needs in ranks]
        return {
            "bytes_sent": _most([needs.sent for needs in ranks]),
            "bytes_formula": _most([needs.formula for needs in ranks]),
            "balance": max(work) * len(work) / sum(work) if sum(work) else None,
            "peak_bytes": _most([needs.peak for needs in ranks]),
            "differs": any(needs.formula is not None and needs.sent != needs.formula for needs in ranks),
        }

    def records(self, result: Result[ContextRow]) -> list[Record]:
        row, needs = result.row, result.needs or {}
        record: Record = {
            "strategy": row.strategy,
            "layout": row.layout,
            "mechanism": row.case.name,
            "degree": row.degree,
            "tokens": result.size,
            "tokens_per_s": None if result.times is None else result.size / (result.times.median("fwd_bwd") / 1e3),
        }
        return [record | {name: needs.get(name) for name in ("bytes_sent", "bytes_formula", "balance", "peak_bytes")}]

    def overlap(self, row: ContextRow, size: int, rounds: int) -> Table:
        """Time a ring's passes with each of the delays, in turn; return the times beside those that they should take.

        Raises RankError if a rank fails.
        """
        calm, times, degree = Times(), [Times() for _ in DELAYS], row.degree
        for _ in range(rounds):
            calm.add(*self._time(row, size, (0.0, 0.0)))
        steps = {direction: calm.median(direction) / degree for direction in ("fwd", "bwd")}
        for _ in range(rounds):
            for delay, of_delay in zip(DELAYS, times, strict=True):
                delays_s = delay * steps["fwd"] / 1e3, delay * steps["bwd"] / 1e3
                of_delay.add(*self._time(row, size, delays_s))
        self.release()
        lines = []
        for direction, calm_step in steps.items():
            step = times[0].median(direction) / degree
            for delay, of_delay in zip(DELAYS, times, strict=True):
                ms, delay_ms = of_delay.median(direction), delay * calm_step
                overlapped, exposed = predicted(degree, direction, step, delay_ms)
                lines.append([direction, step, delay_ms, ms, overlapped, exposed, ms / overlapped])
        note = OVERLAP.format(strategy=row.strategy, layout=row.layout, mechanism=row.case.name, tokens=human(size))
        return Table(heading=f"Overlap, {degree} ranks", note=note, columns=OVERLAP_COLUMNS, lines=lines)

    def report(self, machine: Mapping[str, str], overlap: Sequence[Table], rounds: int) -> Report:
        title = f"Context parallelism: {machine.get('gpu') or machine['cpu']}, {self.shape}"
        groups: dict[tuple[str, int], list[Result[ContextRow]]] = {}
        for result in self.results:
            groups.setdefault((result.row.case.name, result.size), []).append(result)
        tables = [
            Table.of_results(COLUMNS, results, 3, f"{case}, {human(size)} tokens")
            for (case, size), results in groups.items()
        ]
        notes = NOTES.format(rounds=rounds, backend="NCCL" if "gpu" in machine else "gloo")
        notes += DELAYED.format(delay_ms=1e3 * self.delay_s) if self.delay_s else ""
        # The plot is of the first case, dense if it was measured, and its longest sequence.
        case, size = max((key for key in groups if key[0] == next(iter(groups))[0]), default=("nothing", 0))
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in groups.get((case, size), []):
            if result.times is not None:
                row = result.row
                name = "one rank, threads" if row.contender.name == SINGLE else f"{row.strategy}, {row.layout}"
                lines.setdefault(name, []).append((row.degree * row.threads, result.records[0]["tokens_per_s"]))
        plot = Plot(title=f"{title}: {case}, {human(size)} tokens", series=lines, x="ranks", y="tokens/s", log=True)
        return self.report_with(machine, title=title, notes=notes, tables=[*tables, *overlap], plot=plot)


COLUMNS = {
    "strategy": lambda result: result.row.strategy,
    "layout": lambda result: result.row.layout,
    "ranks": lambda result: result.row.degree,
    "tokens/s": lambda result: result.records[0]["tokens_per_s"],
    "forward ms": lambda result: result.times.median("fwd"),
    "backward ms": lambda result: result.times.median("bwd"),
    "speed over one rank": lambda result: result.speedup("fwd_bwd"),
    "MiB sent": lambda result: f"{mib(result.needs.get('bytes_sent'))}{'*' if result.needs.get('differs') else ''}",
    "MiB by formula": lambda result: mib(result.records[0]["bytes_formula"]),
    "balance": lambda result: result.records[0]["balance"],
    "peak MiB": lambda result: mib(result.records[0]["peak_bytes"]),
}
OVERLAP_COLUMNS = (
    "pass", "step ms", "delay ms", "measured ms", "overlapped ms", "exposed ms", "measured over overlapped",
)  # fmt: skip


def predicted(degree: int, direction: str, step: float, delay: float) -> tuple[float, float]:
    """Return how long a ring's pass takes if transfers overlap with computing, and if they do not.

    `degree` steps with a hop between each two; backward the gradient of the last chunk has a hop to go when all is
    computed, the others go together with chunks.
    """
    last_hop = delay if direction == "bwd" else 0.0
    return step + (degree - 1) * max(step, delay) + last_hop, degree * step + (degree - 1) * delay + last_hop


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

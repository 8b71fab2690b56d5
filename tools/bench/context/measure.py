"""The run: judge every row against one process, then measure those that are correct, round by round."""

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from farspan.errors import ConfigError
from farspan.parallel.layout import Shards
from farspan.tools.bench.case import Shape
from farspan.tools.bench.context import on_rank
from farspan.tools.bench.context.entrant import SINGLE, Row
from farspan.tools.bench.context.pool import Pool, Pools, RankError
from farspan.tools.bench.correctness import SLACK, Check, Expected, Verdict, checks
from farspan.tools.bench.measure import LeftOut
from farspan.tools.bench.timing import DIRECTIONS, Times

TRAVELS = "ring"
"""The strategy of which it is shown that transfers are hidden behind computing."""
DELAYS = (0.0, 0.5, 1.0, 2.0)
"""Delays of transfers over the time of a step's computing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result:
    """What was measured of a row. as_many_threads: of one rank with as many threads, in the same rounds.

    peak, sent, stated: of the rank with most. balance: the work of the busiest rank over the mean.
    """

    row: Row
    verdict: Verdict
    tokens: int
    times: Times | None = None
    as_many_threads: Times | None = None
    peak: int | None = None
    sent: int | None = None
    stated: int | None = None
    differs: bool = False
    balance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """A ring's passes with late transfers. late_ms: of each. step_ms: computing between two transfers, without delay.

    ms: as measured. hidden_ms, exposed_ms: as they would be if a step took the longer of both, or their sum.
    """

    degree: int
    direction: str
    late_ms: float
    step_ms: float
    ms: float
    hidden_ms: float
    exposed_ms: float


@dataclass(slots=True)
class Judge:
    """Compares what ranks compute, put together, with the reference on the whole sequence in float64."""

    pools: Pools
    shape: Shape
    left_out: LeftOut
    _expected: dict[str, Expected | None] = field(default_factory=dict)

    def judge(self, row: Row) -> Verdict:
        """Return the verdict of a row: its own mechanism, and the examples of that which it takes."""
        said = []
        for number, check in enumerate(checks(row.case, self.shape, row.entrant.packed)):
            unsupported_reason = row.entrant.unsupported_reason(
                check.mechanism, row.layout, check.shape.heads, row.degree
            )
            expected = None if unsupported_reason else self._expect(check)
            if expected is None:
                if number == 0:
                    return Verdict(
                        False, unsupported_reason or f"{check}: the reference cannot compute it", refused=True
                    )
                continue
            try:
                parts = self.pools.of(row.degree, row.threads).run(on_rank.check, row, check)
            except RankError as error:
                return Verdict(False, f"{check}: {error}", refused=row.entrant.is_rival)
            shards = Shards.build(check.rows, layout=row.layout, degree=row.degree, work=check.mechanism.keys_per_query)
            whole = [shards.unshard(torch.stack(part)) for part in zip(*parts, strict=True)]
            got = [x.to(truth.device) for x, truth in zip(whole, expected.truth, strict=True)]
            verdict = expected.verdict(got, SLACK if row.entrant.is_rival else 1.0)
            if not verdict.correct:
                return verdict
            said.append(verdict.said)
        return Verdict(True, "; ".join(said))

    def _expect(self, check: Check) -> Expected | None:
        if str(check) not in self._expected:
            try:
                self._expected[str(check)] = Expected.of(check)
            except (ConfigError, ValueError):
                self._expected[str(check)] = None
        return self._expected[str(check)]

    def judge_all(self, rows: Iterable[Row]) -> list[tuple[Row, Verdict]]:
        """Return all rows but those of rivals that do not run, which are left out with what they said."""
        judged = []
        for row in rows:
            verdict = self.judge(row)
            if verdict.refused:
                self.left_out.add(row.name, verdict.said)
            else:
                judged.append((row, verdict))
        return judged


def measure_all(
    judged: Sequence[tuple[Row, Verdict]],
    tokens: int,
    shape: Shape,
    rounds: int,
    late_s: float,
    pools: Pools,
    left_out: LeftOut,
) -> list[Result]:
    """Return the results of one mechanism at one size: in each round every correct row runs once.

    late_s: delay of every transfer. A row that dies, for want of memory perhaps, is left out from there on.
    """
    times = {row.name: Times() for row, verdict in judged if verdict.correct}
    for _ in range(rounds):
        for row, _ in judged:
            if row.name not in times:
                continue
            try:
                seconds = pools.of(row.degree, row.threads).run(
                    on_rank.time_pass, row, tokens, shape, late_s=(late_s, late_s)
                )
            except RankError as error:
                left_out.add(f"{row.name}, {tokens} tokens", str(error))
                del times[row.name]
                continue
            _add(times[row.name], seconds)
    for pool in pools.all():
        pool.run(on_rank.forget)
    alone = {row.threads: times.get(row.name) for row, _ in judged if row.entrant.name == SINGLE and row.threads > 1}
    results = []
    for row, verdict in judged:
        result = Result(row=row, verdict=verdict, tokens=tokens)
        if row.name in times:
            result = replace(result, times=times[row.name], as_many_threads=alone.get(row.degree))
            result = _with_needs(result, shape, pools.device, left_out)
        if row.name in times or not verdict.correct:
            results.append(result)
    return results


def _with_needs(result: Result, shape: Shape, device: str, left_out: LeftOut) -> Result:
    """Return a result with what fresh processes tell of memory and bytes."""
    row = result.row
    try:
        with Pool(row.degree, row.threads, device) as pool:
            needs = pool.run(on_rank.measure, row, result.tokens, shape)
    except RankError as error:
        left_out.add(f"memory and bytes of {row.name}, {result.tokens} tokens", str(error))
        return result
    work = [need.work for need in needs]
    return replace(
        result,
        peak=_most([need.peak for need in needs]),
        sent=_most([need.sent for need in needs]),
        stated=_most([need.stated for need in needs]),
        differs=any(need.stated is not None and need.sent != need.stated for need in needs),
        balance=max(work) * len(work) / sum(work) if sum(work) else None,
    )


def _most(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _add(times: Times, seconds: Sequence[tuple[float, float]]) -> None:
    """Add a round: a pass takes as long as its slowest rank."""
    forward, backward = (max(of_direction) for of_direction in zip(*seconds, strict=True))
    times.fwd.append(1e3 * forward)
    times.bwd.append(1e3 * backward)


def measure_overlap(row: Row, tokens: int, shape: Shape, rounds: int, pools: Pools) -> list[Overlap]:
    """Return the times of a ring's passes with each of the delays, measured in turn, and what they should be.

    Raises RankError if a rank fails.
    """
    pool, degree = pools.of(row.degree, row.threads), row.degree
    calm = Times()
    for _ in range(rounds):
        _add(calm, pool.run(on_rank.time_pass, row, tokens, shape))
    steps = {direction: calm.median(direction) / degree for direction in DIRECTIONS}
    times = [Times() for _ in DELAYS]
    for _ in range(rounds):
        for delay, of_delay in zip(DELAYS, times, strict=True):
            late_s = delay * steps["fwd"] / 1e3, delay * steps["bwd"] / 1e3
            _add(of_delay, pool.run(on_rank.time_pass, row, tokens, shape, late_s=late_s))
    pool.run(on_rank.forget)
    found = []
    for direction in ("fwd", "bwd"):
        step = times[0].median(direction) / degree
        for delay, of_delay in zip(DELAYS, times, strict=True):
            late = delay * steps[direction]
            hidden, exposed = predicted(degree, direction, step, late)
            found.append(
                Overlap(
                    degree=degree,
                    direction=direction,
                    late_ms=late,
                    step_ms=step,
                    ms=of_delay.median(direction),
                    hidden_ms=hidden,
                    exposed_ms=exposed,
                )
            )
    return found


def predicted(degree: int, direction: str, step: float, late: float) -> tuple[float, float]:
    """Return how long a ring's pass takes if transfers are hidden behind computing, and if they are not.

    `degree` steps with a hop between each two; backward the gradient of the last chunk has a hop to go when all is
    computed, the others go together with chunks.
    """
    home = late if direction == "bwd" else 0.0
    return step + (degree - 1) * max(step, late) + home, degree * step + (degree - 1) * late + home


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rate(tokens: int, times: Times) -> float:
    """Return tokens per second, forward and backward together, by the median of the rounds."""
    return tokens / (times.median("fwd_bwd") / 1e3)


def ratio(result: Result) -> float | None:
    """Return the speed of a row over that of one rank with as many threads: the median of the rounds' ratios."""
    if result.times is None or result.as_many_threads is None:
        return None
    pairs = zip(result.as_many_threads.of("fwd_bwd"), result.times.of("fwd_bwd"), strict=False)
    return statistics.median(theirs / mine for theirs, mine in pairs)

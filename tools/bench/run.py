"""The run: judge every pair of a mechanism and a contender, then measure those that are correct, size by size."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from farspan.errors import ConfigError
from farspan.tools.bench.case import BASELINE, Attention, Case, Contender, Ours, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import Judge, Verdict
from farspan.tools.bench.memory import Peaks, peaks_of
from farspan.tools.bench.timing import Times, time_once

WARM_UPS = {"cpu": 0, "cuda": 2}
"""Passes at full size before the rounds: a GPU's kernels are compiled for shapes; a CPU is warm from the checks."""
FEWEST_ROUNDS = 3
ROUNDS_S = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A row of the table: a case as one contender computes it, with what the check said."""

    case: Case
    contender: Contender
    verdict: Verdict

    @property
    def name(self) -> str:
        return f"{self.case.name} by {self.contender.name}"

    @property
    def is_baseline(self) -> bool:
        return self.case.name == BASELINE and isinstance(self.contender, Ours) and self.verdict.correct


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result:
    """What was measured of a pair at one size; `baseline` are the times of dense attention in the same rounds."""

    pair: Pair
    tokens: int
    times: Times | None = None
    baseline: list[Times] = field(default_factory=list)
    peaks: Peaks | None = None


@dataclass(kw_only=True, slots=True)
class Limits:
    """rounds: of timing, fewer where they would take over ROUNDS_S. case_s: no case is started that would take longer.

    deadline: of `time.monotonic`; nothing is started that would end later.
    """

    rounds: int
    case_s: float
    deadline: float

    def unsupported_reason(self, passes_s: float | None) -> str:
        """Return why a case whose passes take so long, if that is known, is not started; or nothing."""
        if time.monotonic() + FEWEST_ROUNDS * (passes_s or 0.0) > self.deadline:
            return "the time budget is used up"
        if passes_s is not None and passes_s > self.case_s:
            return f"a forward and backward pass would take {passes_s:.0f} s, over the limit of {self.case_s:.0f} s"
        return ""

    def rounds_of(self, round_s: float) -> int:
        """Return how many rounds to run if one takes so long."""
        return max(FEWEST_ROUNDS, min(self.rounds, int(ROUNDS_S / max(round_s, 1e-9))))


@dataclass(slots=True)
class LeftOut:
    """What was not measured, and why, in the order of the run."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, reason: str) -> None:
        self.reasons.setdefault(what, reason)


def judge_all(cases: Sequence[Case], contenders: Sequence[Contender], shape: Shape, left_out: LeftOut) -> list[Pair]:
    """Return every pair that claims to work, with its verdict."""
    pairs, judge = [], Judge(shape)
    for case in cases:
        for contender in contenders:
            if case.packed and not contender.packed:
                continue
            verdict = judge.judge(contender, case)
            if not verdict.refused:
                pairs.append(Pair(case, contender, verdict))
            elif isinstance(contender, Ours):
                left_out.add(f"{case.name} by {contender.name}", verdict.said)
    return pairs


def measure_all(
    pairs: Sequence[Pair], sizes: Iterable[int], shape: Shape, limits: Limits, left_out: LeftOut
) -> Iterator[list[Result]]:
    """Yield the results of each size: of each pair that is wrong, without a number, and of those that were measured."""
    seconds_per_pair: dict[str, float] = {}
    for tokens in sorted(sizes):
        chosen: list[tuple[Pair, int]] = []
        round_s = 0.0
        for pair in pairs:
            if not pair.verdict.correct:
                continue
            rows = pair.case.rows(tokens)
            work = pair.case.mechanism.unmasked_pairs(rows, rows)
            rate = seconds_per_pair.get(pair.name)
            passes_s = None if rate is None else rate * work
            if reason := limits.unsupported_reason(passes_s):
                left_out.add(f"{pair.name}, {tokens} tokens", reason)
            else:
                chosen.append((pair, work))
                round_s += passes_s or 0.0
        times = _rounds([pair for pair, _ in chosen], tokens, shape, limits, round_s, left_out)
        baseline = [times[pair.name] for pair, _ in chosen if pair.is_baseline and pair.name in times]
        results = [Result(pair=pair, tokens=tokens) for pair in pairs if not pair.verdict.correct]
        for pair, work in chosen:
            if pair.name in times:
                mine = times[pair.name]
                passes_s = mine.median("fwd_bwd") / 1e3
                seconds_per_pair[pair.name] = passes_s / max(work, 1)
                peaks = (
                    None if limits.unsupported_reason(passes_s) else peaks_of(pair.contender, pair.case, tokens, shape)
                )
                results.append(Result(pair=pair, tokens=tokens, times=mine, baseline=baseline, peaks=peaks))
        yield sorted(results, key=lambda result: pairs.index(result.pair))


def _rounds(
    pairs: Sequence[Pair], tokens: int, shape: Shape, limits: Limits, round_s: float, left_out: LeftOut
) -> dict[str, Times]:
    """Return the times of each pair by name; one that dies, for want of memory perhaps, is left out from there on.

    round_s: how long a round will take, as far as is known.
    """
    planned = _plan_and_warm_up(pairs, tokens, shape, limits, left_out)
    dout = gradient_of_out(tokens, shape)
    times = {name: Times() for name in planned}
    for _ in range(limits.rounds_of(round_s)):
        for name in list(times):
            attention, inputs = planned[name]
            try:
                forward, backward = time_once(attention, inputs, dout)
            except RuntimeError as error:
                left_out.add(f"{name}, {tokens} tokens", _first_line(error))
                del times[name]
                continue
            times[name].fwd.append(forward)
            times[name].bwd.append(backward)
    return times


def _plan_and_warm_up(
    pairs: Sequence[Pair], tokens: int, shape: Shape, limits: Limits, left_out: LeftOut
) -> dict[str, tuple[Attention, list[Tensor]]]:
    """Return the attention and the inputs of each pair by name; inputs are shared where they are alike."""
    inputs: dict[int, list[Tensor]] = {}
    planned: dict[str, tuple[Attention, list[Tensor]]] = {}
    dout = gradient_of_out(tokens, shape)
    for pair in pairs:
        mechanism = pair.case.mechanism
        reason = limits.unsupported_reason(None)
        try:
            if not reason:
                width = mechanism.routing_width
                inputs[width] = inputs.get(width) or inputs_of(mechanism, tokens, shape)
                attention = pair.contender.plan(mechanism, pair.case.rows(tokens), shape)
                for _ in range(WARM_UPS[shape.device.type]):
                    time_once(attention, inputs[width], dout)
                planned[pair.name] = attention, inputs[width]
        except (ConfigError, ValueError, RuntimeError) as error:
            reason = _first_line(error)
        if reason:
            left_out.add(f"{pair.name}, {tokens} tokens", reason)
    return planned


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def measure_memory(
    results: Sequence[Result], pairs: Sequence[Pair], sizes: Sequence[int], shape: Shape, limits: Limits
) -> dict[str, list[int]]:
    """Return the peak of a forward and backward pass at each size, by pair; a row ends where the budget does.

    What `results` hold is not measured again.
    """
    known = {(result.pair.name, result.tokens): result.peaks for result in results}
    found: dict[str, list[int]] = {}
    for pair in pairs:
        if not pair.verdict.correct:
            continue
        found[pair.name] = []
        for tokens in sizes:
            peaks = known.get((pair.name, tokens))
            if peaks is None and not limits.unsupported_reason(None):
                peaks = peaks_of(pair.contender, pair.case, tokens, shape)
            if peaks is None:
                break
            found[pair.name].append(peaks["fwd_bwd"])
    return found

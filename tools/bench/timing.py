"""Timing by rounds: every row runs once per round, so that all meet the same ups and downs of the machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from farspan.tools.bench.case import Attention

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
Pass = Callable[[], tuple[float, float]]
"""Runs a forward and a backward pass; returns their milliseconds."""


@dataclass(slots=True)
class Times:
    """Milliseconds of each round, forward and backward."""

    fwd: list[float] = field(default_factory=list)
    bwd: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        self.fwd.append(forward)
        self.bwd.append(backward)

    def of(self, direction: str) -> list[float]:
        """Return the milliseconds of each round in one of DIRECTIONS."""
        if direction == "fwd_bwd":
            return [forward + backward for forward, backward in zip(self.fwd, self.bwd, strict=True)]
        return self.fwd if direction == "fwd" else self.bwd

    def median(self, direction: str) -> float:
        return statistics.median(self.of(direction))

    def shortest(self, direction: str) -> float:
        return min(self.of(direction))

    def ratios_to(self, other: "Times", direction: str) -> list[float]:
        """Return the other's time over this one's, round by round: a slow round slows both and does not count."""
        return [x / y for x, y in zip(other.of(direction), self.of(direction), strict=True)]


def warm_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor, warm_ups: int) -> Pass:
    """Run so many passes, and return the next one."""
    for _ in range(warm_ups):
        time_once(attention, inputs, dout)
    return partial(time_once, attention, inputs, dout)


def time_once(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> tuple[float, float]:
    """Return the milliseconds of one forward and one backward pass."""
    clock = _CudaClock() if dout.is_cuda else _Clock()
    clock.tick()
    out = attention(*inputs)
    clock.tick()
    torch.autograd.grad(out, inputs, dout)
    clock.tick()
    forward, backward = clock.laps()
    return forward, backward


class _Clock:
    def __init__(self) -> None:
        self._ticks: list[float] = []

    def tick(self) -> None:
        self._ticks.append(time.perf_counter())

    def laps(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self._ticks, self._ticks[1:], strict=False)]


class _CudaClock:
    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._ticks: list[torch.cuda.Event] = []

    def tick(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ticks.append(event)

    def laps(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self._ticks, self._ticks[1:], strict=False)]

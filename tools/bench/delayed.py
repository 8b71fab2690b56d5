"""Delayed transfers: a channel whose messages take longer, as over a slower network; senders do not wait."""

import time
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.comm import Channel, Traffic, Transfer

STAMP_TAGS = 1000
"""Added to the tag of a transfer for the message with its start time."""


@dataclass(slots=True)
class Delay:
    """seconds: a transfer completes no earlier than so long after the last of its senders started it."""

    seconds: float = 0.0


@final
class DelayedChannel(Channel):
    """A channel on one machine, whose ranks share a clock; senders also send their start time, which is not counted."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        traffic: Traffic,
        delay: Delay,
        *,
        inner: "DelayedChannel | None" = None,
        outer: "DelayedChannel | None" = None,
    ) -> None:
        super().__init__(group, traffic, inner=inner, outer=outer)
        self.delay = delay

    def _shift(self, buffer: Tensor, tag: int, to: int, source: int, kind: str) -> Transfer:
        if not self.delay.seconds:
            return super()._shift(buffer, tag, to, source, kind)
        started = super()._shift(_now(), STAMP_TAGS + tag, to, source, kind)
        return DelayedTransfer(super()._shift(buffer, tag, to, source, kind), started, self.delay.seconds)

    def _all_to_all(self, buffer: Tensor, sent: list[int], received: list[int], kind: str) -> Transfer:
        if not self.delay.seconds:
            return super()._all_to_all(buffer, sent, received, kind)
        # Only from ranks that send something: waiting for others is no transfer.
        stamps_out, stamps_in = (
            [int(rank != self.rank and rows > 0) for rank, rows in enumerate(counts)] for counts in (sent, received)
        )
        started = super()._all_to_all(_now().expand(sum(stamps_out)).contiguous(), stamps_out, stamps_in, kind)
        return DelayedTransfer(super()._all_to_all(buffer, sent, received, kind), started, self.delay.seconds)

    def _all_gather(self, buffer: Tensor, kind: str) -> list[Tensor]:
        if not self.delay.seconds:
            return super()._all_gather(buffer, kind)
        started = torch.cat(super()._all_gather(_now(), kind))
        gathered = super()._all_gather(buffer, kind)
        _sleep_until(float(started.max()) + self.delay.seconds)
        return gathered

    def _all_reduce(self, x: Tensor, kind: str) -> Tensor:
        if not self.delay.seconds:
            return super()._all_reduce(x, kind)
        started = torch.cat(super()._all_gather(_now(), kind))
        total = super()._all_reduce(x, kind)
        _sleep_until(float(started.max()) + self.delay.seconds)
        return total


@final
class DelayedTransfer(Transfer):
    """A transfer, and a second one with the start times of its senders."""

    def __init__(self, transfer: Transfer, started: Transfer, seconds: float) -> None:
        self.transfer, self.started, self.seconds = transfer, started, seconds

    def wait(self) -> Tensor:
        received, started = self.transfer.wait(), self.started.wait()
        if len(started):
            _sleep_until(float(started.max()) + self.seconds)
        return received


def _now() -> Tensor:
    return torch.tensor([time.monotonic()], dtype=torch.float64)


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0.0))

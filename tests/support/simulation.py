"""Ranks without processes: channels for plans alone, and worlds of threads whose transfers are real.

The same strategies run on both, at degrees far beyond the processes of one machine.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from farspan.parallel.comm import Channel, Traffic, Transfer

Result = TypeVar("Result")
Address = tuple[tuple[int, ...], int, int, int]
"""Ranks of the channel, sender, reader, tag."""
TIMEOUT_S, POLL_S = 60.0, 0.5
COLLECTIVE = 0
"""Tag of messages that belong to collectives."""


class MissingMessageError(RuntimeError):
    """A message did not come."""


class World:
    """What the threads of a simulated world share: what each has sent to others, by address."""

    def __init__(self) -> None:
        self.mail: dict[Address, SimpleQueue[Tensor]] = {}
        self.failed = False

    def put(self, address: Address, x: Tensor) -> None:
        self._box(address).put(x)

    def take(self, address: Address) -> Tensor:
        """Return the first message of an address; raises MissingMessageError once somebody has failed."""
        for _ in range(round(TIMEOUT_S / POLL_S)):
            with suppress(Empty):
                return self._box(address).get(timeout=POLL_S)
            if self.failed:
                break
        raise MissingMessageError(f"nobody sent {address}")

    def _box(self, address: Address) -> SimpleQueue[Tensor]:
        return self.mail.setdefault(address, SimpleQueue())


class Threaded(Channel):
    """The channel of one thread of a simulated world, by messages in memory."""

    def __init__(self, world: World, ranks: Sequence[int], rank: int, traffic: Traffic, *, width: int = 1) -> None:
        """ranks: those of the channel, in its order, of the world's. rank: this one's place among them."""
        self.world, self.ranks, self.rank, self.size, self.traffic = world, tuple(ranks), rank, len(ranks), traffic
        self.inner = self.outer = None
        if width > 1:
            outer, inner = divmod(rank, width)
            row, column = self.ranks[outer * width : (outer + 1) * width], self.ranks[inner::width]
            self.inner = Threaded(world, row, inner, traffic)
            self.outer = Threaded(world, column, outer, traffic)

    def _shift(self, buffer: Tensor, tag: int, to: int, source: int, kind: str) -> Transfer:
        self._send(buffer, to, tag)
        return _Awaited(self, source, tag)

    def _all_reduce(self, x: Tensor, kind: str) -> Tensor:
        return torch.stack(self._all_gather(x, kind)).sum(dim=0, dtype=x.dtype)

    def _all_gather(self, buffer: Tensor, kind: str) -> list[Tensor]:
        for to in range(self.size):
            self._send(buffer, to, COLLECTIVE)
        return [self._receive(source, COLLECTIVE) for source in range(self.size)]

    def _all_to_all(self, buffer: Tensor, sent: list[int], received: list[int], kind: str) -> Transfer:
        for to, part in enumerate(buffer.split(sent)):
            self._send(part, to, COLLECTIVE)
        parts = [self._receive(source, COLLECTIVE) for source in range(self.size)]
        assert [len(part) for part in parts] == received, "ranks differ in what they exchange"
        return Transfer(torch.cat(parts), buffer, (), kind)

    def _send(self, x: Tensor, to: int, tag: int) -> None:
        self.world.put((self.ranks, self.rank, to, tag), x.clone())

    def _receive(self, source: int, tag: int) -> Tensor:
        return self.world.take((self.ranks, source, self.rank, tag))


class _Awaited(Transfer):
    """A message of another thread, taken when it is waited for."""

    def __init__(self, channel: Threaded, source: int, tag: int) -> None:
        self.channel, self.source, self.tag = channel, source, tag

    def wait(self) -> Tensor:
        return self.channel._receive(self.source, self.tag)


def simulate(size: int, function: Callable[[Channel], Result], *, width: int = 1) -> list[Result]:
    """Call `function` on every rank of a world of threads, each with its channel; return the results in rank order.

    Raises the error of the lowest rank that failed by itself.
    """
    world = World()
    results: list[Result | None] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(Threaded(world, range(size), rank, Traffic(), width=width))
        except BaseException as error:
            errors[rank] = error
            world.failed = True

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [error for error in errors if error is not None]
    if failed:
        raise next((error for error in failed if not isinstance(error, MissingMessageError)), failed[0])
    return results  # pyright: ignore[reportReturnType]

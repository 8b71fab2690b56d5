"""Worlds of threads: channels whose transfers are real, at degrees beyond the processes of one machine."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.parallel.comm import Channel, GradCommDtype, Traffic, Transfer
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Volume
from farspan.parallel.layout import Shards

Result = TypeVar("Result")
Address = tuple[tuple[int, ...], int, int, int]
"""Ranks of the channel, sender, receiver, tag."""
TIMEOUT_S, POLL_S = 120.0, 0.5
COLLECTIVE = 0
"""Tag of messages that belong to collectives."""


class MissingMessageError(RuntimeError):
    """A message did not arrive."""


class World:
    """The messages in flight between the threads of a simulated world, by address."""

    def __init__(self) -> None:
        self.mail: dict[Address, SimpleQueue[Tensor]] = {}
        self.failed = False

    def put(self, address: Address, x: Tensor) -> None:
        self._box(address).put(x)

    def take(self, address: Address) -> Tensor:
        """Return the first message of an address; raises MissingMessageError once a thread has failed."""
        for _ in range(round(TIMEOUT_S / POLL_S)):
            with suppress(Empty):
                return self._box(address).get(timeout=POLL_S)
            if self.failed:
                break
        raise MissingMessageError(f"no message for {address}")

    def _box(self, address: Address) -> SimpleQueue[Tensor]:
        return self.mail.setdefault(address, SimpleQueue())


class Threaded(Channel):
    """The channel of one thread of a simulated world, by messages in memory."""

    def __init__(self, world: World, ranks: Sequence[int], rank: int, traffic: Traffic, *, inner_size: int = 1) -> None:
        """ranks: the world's, in the order of the channel. rank: the index of this one among them."""
        self.world, self.ranks, self.rank, self.size, self.traffic = world, tuple(ranks), rank, len(ranks), traffic
        self.inner, self.outer, self.gradients = None, None, self
        if inner_size > 1:
            outer, inner = divmod(rank, inner_size)
            group, column = self.ranks[outer * inner_size : (outer + 1) * inner_size], self.ranks[inner::inner_size]
            self.inner = Threaded(world, group, inner, traffic)
            self.outer = Threaded(world, column, outer, traffic)

    def _shift(self, buffer: Tensor, tag: int, to: int, source: int, kind: str) -> Transfer:
        self._send(buffer, to, tag)
        return _Message(self, source, tag)

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


class _Message(Transfer):
    """A message of another thread, received by `wait`."""

    def __init__(self, channel: Threaded, source: int, tag: int) -> None:
        self.channel, self.source, self.tag = channel, source, tag

    def wait(self) -> Tensor:
        return self.channel._receive(self.source, self.tag)


def simulate(size: int, function: Callable[[Channel], Result], *, inner_size: int = 1) -> list[Result]:
    """Call `function` on every rank of a world of threads, each with its channel; return the results in rank order.

    Raises the error of the lowest rank that did not fail for lack of a message.
    """
    world = World()

    def run(rank: int) -> Result:
        try:
            return function(Threaded(world, range(size), rank, Traffic(), inner_size=inner_size))
        except BaseException:
            world.failed = True
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, MissingMessageError)), errors[0])
    return [future.result() for future in futures]


@dataclass(frozen=True)
class SimulatedAttention:
    """tensors: as of `tests.support.mechanisms.attend`, of the full sequence. sent, plans: of each rank."""

    tensors: list[Tensor]
    sent: list[Volume]
    plans: list[DistributedAttention]


def simulate_attention(
    strategy: str,
    mechanism: Mechanism,
    shards: Shards,
    heads: Heads,
    inputs: Sequence[Tensor],
    *,
    inner_size: int = 1,
    grad_comm_dtype: GradCommDtype = "accumulation",
) -> SimulatedAttention:
    """Run attention forward and backward on simulated ranks; inputs: q, k, v, routing and dout of the full sequence."""

    def attend(channel: Channel) -> tuple[list[Tensor], Volume, DistributedAttention]:
        planning = STRATEGIES.get(strategy)(channel, grad_comm_dtype=grad_comm_dtype)
        planned = planning.prepare(mechanism, shards, heads, backend="cpu")
        *local, dout = (shards.shard(x, channel.rank) for x in inputs)
        out, saved = planned.forward(*local)
        forward = channel.traffic.take().sent.total()
        gradients = planned.backward(dout, saved)
        volume = Volume(forward=forward, backward=channel.traffic.take().sent.total())
        lse = planned.lse(saved)
        return [out, *([] if lse is None else [lse]), *gradients], volume, planned

    tensors, sent, plans = zip(*simulate(shards.degree, attend, inner_size=inner_size), strict=True)
    full = [shards.unshard(torch.stack(parts)) for parts in zip(*tensors, strict=True)]
    return SimulatedAttention(full, list(sent), list(plans))

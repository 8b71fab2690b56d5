"""Channels: transfers of tensors over one process group, asynchronous where callers overlap them, all bytes counted.

The ranks of a channel may form a grid of node groups, such as the GPUs of a node; each has a channel of its own:

    rank = outer.rank x inner.size + inner.rank        inner: the ranks 0 1, 2 3, …   outer: the ranks 0 2, 1 3, …
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

GradCommDtype = Literal["accumulation", "compute"]
"""How gradients of keys and values travel: in the dtype of sums, or in that of the keys."""


@dataclass(kw_only=True, slots=True)
class Traffic:
    """Bytes that this rank has sent to other ranks and received from them, by kind."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    # All-reduced bytes by kind and ranks.
    _reduced: Counter[tuple[str, int]] = field(default_factory=Counter, repr=False, compare=False)

    def add(self, kind: str, *, sent: int, received: int) -> None:
        self.sent[kind] += sent
        self.received[kind] += received

    def add_reduced(self, kind: str, size: int, ranks: int) -> None:
        """Count an all-reduce of `size` bytes: a ring all-reduce sends 2 (P-1)/P of them."""
        # Rounded down once for the sum of a kind, not per call: a formula need not know the number of calls.
        before = 2 * (ranks - 1) * self._reduced[kind, ranks] // ranks
        self._reduced[kind, ranks] += size
        moved = 2 * (ranks - 1) * self._reduced[kind, ranks] // ranks - before
        self.add(kind, sent=moved, received=moved)

    def take(self) -> "Traffic":
        """Return the bytes counted since the last call, and reset the counters."""
        taken = Traffic(sent=self.sent.copy(), received=self.received.copy())
        self.sent.clear()
        self.received.clear()
        self._reduced.clear()
        return taken


class PeerError(RuntimeError):
    """Another rank failed or hangs, and this rank waits for it: gloo's error. NCCL has none, see docs/guide.md."""


@contextmanager
def _waiting_for_peers(kind: str) -> Iterator[None]:
    """Turn an error of the backend into one that names what this rank was waiting for."""
    try:
        yield
    except RuntimeError as error:
        rank = dist.get_rank()
        raise PeerError(
            f"rank {rank} gave up waiting for {kind!r} from other ranks: one of them failed before, see its own error, "
            f"or hung for longer than parallel.timeout_s. The backend says: {error}"
        ) from error


class Transfer:
    """An asynchronous transfer to this rank."""

    def __init__(self, received: Tensor, sent: Tensor, works: Sequence[dist.Work], kind: str) -> None:
        self._received, self._works, self._kind = received, works, kind
        # The backend reads the buffer until the transfer is done, so it must outlive the caller's reference.
        self._sent = sent

    def wait(self) -> Tensor:
        """Return the received tensor, complete for what follows; raises PeerError if other ranks do not send it.

        With NCCL the host goes on: what follows on the device waits.
        """
        with _waiting_for_peers(self._kind):
            for work in self._works:
                work.wait()
        return self._received


class Channel:
    """One process group; ranks are numbered within it. On CPUs, methods that wait raise PeerError if other ranks fail.

    inner, outer: the channels of the two axes, where the ranks form a grid. gradients: one of the same ranks, for
    gradients that travel while keys do; the channel itself, if left out.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        traffic: Traffic,
        *,
        inner: "Channel | None" = None,
        outer: "Channel | None" = None,
        gradients: "Channel | None" = None,
    ) -> None:
        self.group = group
        self.traffic = traffic
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.inner, self.outer = inner, outer
        self.gradients = self if gradients is None else gradients

    @property
    def inner_size(self) -> int:
        """The ranks of a node group, W; 1 without a grid."""
        return 1 if self.inner is None else self.inner.size

    def shift(
        self, buffer: Tensor, *, kind: str, tag: int, to: int | None = None, source: int | None = None
    ) -> Transfer:
        """Start sending `buffer` to one rank, by default the next, and receiving the same size, by default from the
        previous one.

        Every rank has to call, with sources that match the targets of the others. Transfers of one tag arrive in the
        order they were started. gloo keeps tags apart; NCCL ignores them and sends all transfers of a group in order:
        those that should not wait for each other need channels of their own.
        """
        assert self.size > 1, "a ring of one rank has no neighbor"
        assert buffer.is_contiguous(), "a transfer reads contiguous memory"
        to = (self.rank + 1) % self.size if to is None else to
        source = (self.rank - 1) % self.size if source is None else source
        self.traffic.add(kind, sent=buffer.nbytes, received=buffer.nbytes)
        return self._shift(buffer, tag, to, source, kind)

    def all_reduce(self, x: Tensor, *, kind: str) -> Tensor:
        """Return the sum of `x` over all ranks; a contiguous `x` is overwritten with it."""
        if self.size == 1:
            return x
        self.traffic.add_reduced(kind, x.nbytes, self.size)
        return self._all_reduce(x.contiguous(), kind)

    def all_gather(self, buffer: Tensor, *, kind: str) -> list[Tensor]:
        """Return the buffers of all ranks, in their order."""
        if self.size == 1:
            return [buffer]
        moved = (self.size - 1) * buffer.nbytes
        self.traffic.add(kind, sent=moved, received=moved)
        return self._all_gather(buffer.contiguous(), kind)

    def all_to_all(self, buffer: Tensor, *, kind: str) -> Tensor:
        """Send row i of `buffer` `[P, ...]` to rank i and return `[P, ...]`, row i from rank i."""
        assert buffer.shape[0] == self.size
        ones = [1] * self.size
        return self.start_all_to_all(buffer, sent=ones, received=ones, kind=kind).wait()

    def start_all_to_all(self, buffer: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str) -> Transfer:
        """Start sending the first `sent[0]` rows of `buffer` to rank 0, the next `sent[1]` to rank 1, and so on.

        The result is `[sum(received), ...]`, the `received[0]` rows from rank 0 first; both sides know all counts.
        """
        assert len(sent) == len(received) == self.size
        assert sum(sent) == len(buffer)
        if self.size == 1:
            return Transfer(buffer, buffer, (), kind)
        row = buffer.element_size() * buffer.shape[1:].numel()
        # Rows to the rank itself are copied, not sent.
        self.traffic.add(
            kind, sent=(len(buffer) - sent[self.rank]) * row, received=(sum(received) - received[self.rank]) * row
        )
        return self._all_to_all(buffer.contiguous(), list(sent), list(received), kind)

    def _shift(self, buffer: Tensor, tag: int, to: int, source: int, kind: str) -> Transfer:
        received = torch.empty_like(buffer)
        ranks = dist.get_process_group_ranks(self.group)
        with _waiting_for_peers(kind):
            # One batch: NCCL would deadlock on separate sends that wait for each other around a ring.
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, buffer, ranks[to], self.group, tag),
                    dist.P2POp(dist.irecv, received, ranks[source], self.group, tag),
                ]
            )
        return Transfer(received, buffer, works, kind)

    def _all_reduce(self, x: Tensor, kind: str) -> Tensor:
        with _waiting_for_peers(kind):
            dist.all_reduce(x, group=self.group)
        return x

    def _all_gather(self, buffer: Tensor, kind: str) -> list[Tensor]:
        gathered = [torch.empty_like(buffer) for _ in range(self.size)]
        with _waiting_for_peers(kind):
            dist.all_gather(gathered, buffer, group=self.group)
        return gathered

    def _all_to_all(self, buffer: Tensor, sent: list[int], received: list[int], kind: str) -> Transfer:
        arrived = buffer.new_empty(sum(received), *buffer.shape[1:])
        with _waiting_for_peers(kind):
            work = dist.all_to_all_single(arrived, buffer, received, sent, group=self.group, async_op=True)
        return Transfer(arrived, buffer, [work] if work is not None else [], kind)


class Unconnected(Channel):
    """The channel of one rank without its peers: for plans and their formulas; it cannot send."""

    def __init__(self, rank: int, size: int, *, inner_size: int = 1) -> None:
        self.rank, self.size, self.traffic = rank, size, Traffic()
        self.inner = Unconnected(rank % inner_size, inner_size) if inner_size > 1 else None
        self.outer = Unconnected(rank // inner_size, size // inner_size) if inner_size > 1 else None
        self.gradients = self

    def _fail(self, *_: object, **__: object) -> NoReturn:
        raise RuntimeError("this channel is for plans: it has no peers to send to")

    _shift = _all_reduce = _all_gather = _all_to_all = _fail

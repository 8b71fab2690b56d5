"""Channels: what strategies send over one process group, overlapped where it can be, and counted always."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Traffic:
    """Bytes that this rank has sent to other ranks, by kind."""

    sent_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        self.sent_bytes[kind] += num_bytes

    def take(self) -> dict[str, int]:
        """Return the bytes by kind since the last call, and start over."""
        taken = dict(self.sent_bytes)
        self.sent_bytes.clear()
        return taken


class Shift:
    """A transfer to the next rank of the ring that is under way."""

    def __init__(self, received: Tensor, sent: Tensor, works: list[dist.Work]) -> None:
        self._received, self._works = received, works
        # The backend reads the buffer until the transfer is done: it must outlive the caller's own reference.
        self._sent = sent

    def wait(self) -> Tensor:
        """Return what the previous rank sent, once it is here."""
        for work in self._works:
            work.wait()
        return self._received


class Channel:
    """One process group; ranks are counted within it."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.group = group
        self.traffic = traffic
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def shift(self, buffer: Tensor, *, kind: str, tag: int) -> Shift:
        """Start sending `buffer` to the next rank and receiving one of the same size from the previous rank.

        Transfers of one tag arrive in the order they were started; transfers of different tags are independent.
        """
        assert self.size > 1, "a ring of one rank has nobody to send to"
        assert buffer.is_contiguous(), "a transfer reads one stretch of memory"
        received = torch.empty_like(buffer)
        ranks = dist.get_process_group_ranks(self.group)
        following, previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, buffer, following, self.group, tag),
                dist.P2POp(dist.irecv, received, previous, self.group, tag),
            ]
        )
        self.traffic.add(kind, buffer.nbytes)
        return Shift(received, buffer, works)

    def all_reduce(self, x: Tensor, *, kind: str) -> Tensor:
        """Return the sum of `x` over all ranks."""
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
            self.traffic.add(kind, 2 * x.nbytes * (self.size - 1) // self.size)
        return x

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        """Return `x` of all ranks, `[size, ...]`."""
        if self.size == 1:
            return x.unsqueeze(0)
        gathered = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        self.traffic.add(kind, (self.size - 1) * x.nbytes)
        return gathered

    def all_to_all(self, buffer: Tensor, *, kind: str) -> Tensor:
        """Send part i of `buffer` `[size, ...]` to rank i and return `[size, ...]`, part i from rank i."""
        assert buffer.shape[0] == self.size
        if self.size == 1:
            return buffer
        buffer = buffer.contiguous()
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=self.group)
        self.traffic.add(kind, buffer.nbytes // self.size * (self.size - 1))
        return received

    def all_to_all_uneven(self, buffer: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str) -> Tensor:
        """Send the first `sent[0]` rows of `buffer` to rank 0, the next `sent[1]` to rank 1, and so on.

        Return `[sum of received, ...]`, first the `received[0]` rows from rank 0; both sides know all counts.
        """
        assert len(sent) == len(received) == self.size
        assert sum(sent) == len(buffer)
        if self.size == 1:
            return buffer
        arrived = buffer.new_empty(sum(received), *buffer.shape[1:])
        dist.all_to_all_single(arrived, buffer.contiguous(), list(received), list(sent), group=self.group)
        self.traffic.add(kind, (len(buffer) - sent[self.rank]) * buffer[:1].nbytes)
        return arrived

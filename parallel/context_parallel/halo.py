"""Halo: rows of other ranks that a rank reads because they come just before its own, under any layout.

Of a document over all ranks, contiguous ranks read the end of one neighbor's rows, zigzag ranks of two neighbors';
striped ranks read all rows of as many ranks as the reach.
"""

from dataclasses import dataclass

from torch import Tensor

from farspan.kernels.layers.key_convolution import earlier_rows
from farspan.kernels.masks.rows import Rows
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.strategy import Volume
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Halo:
    """What one rank gets from the others and gives to them, planned for one dealt sequence.

    rows: what arrives, from rank 0 first. places: int64, the local rows that go out, those to rank 0 first; a row may
    go to several ranks. sent, received: how many to and from each rank. is_quiet: no rank reads of another.
    """

    rows: Rows
    places: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    is_quiet: bool

    @staticmethod
    def plan(shards: Shards, rank: int, reach: int) -> "Halo":
        """Plan for the rows up to `reach` positions before those of `rank`, in their documents."""
        reader, token, place = _transfers(shards, reach)
        holder, degree = place // shards.tokens_local, shards.degree
        wanted, given = reader == rank, holder == rank
        # By token already: sender and reader list what goes between them in the same order.
        arriving = token[wanted][holder[wanted].argsort(stable=True)]
        leaving = place[given] % shards.tokens_local
        return Halo(
            rows=shards.rows.take(arriving),
            places=leaving,
            sent=tuple(reader[given].bincount(minlength=degree).tolist()),
            received=tuple(holder[wanted].bincount(minlength=degree).tolist()),
            is_quiet=not len(token),
        )

    def volume(self, row_elements: int, element_bytes: int, accumulation_bytes: int) -> Volume:
        """Return the bytes that this rank sends: rows forward; backward the gradients of what it got, accumulated."""
        return Volume(
            forward=sum(self.sent) * row_elements * element_bytes,
            backward=sum(self.received) * row_elements * accumulation_bytes,
        )

    def fetch(self, x: Tensor, channel: Channel, *, kind: str) -> Tensor:
        """Return the halo `[len(rows), ...]` of x `[tokens_local, ...]`; every rank has to call."""
        outgoing = x[self.places.to(x.device)]
        if self.is_quiet:
            return outgoing
        return channel.all_to_all_uneven(outgoing, sent=self.sent, received=self.received, kind=kind)

    def give_back_(self, dx: Tensor, dhalo: Tensor, channel: Channel, *, kind: str) -> None:
        """Send the gradient of the halo home and add what comes home to `dx` `[tokens_local, ...]`, rank by rank."""
        if self.is_quiet:
            return
        arrived = channel.all_to_all_uneven(dhalo, sent=self.received, received=self.sent, kind=kind)
        parts = zip(self.places.to(dx.device).split(self.sent), arrived.split(self.sent), strict=True)
        for places, part in parts:
            dx[places] += part


def mean_rows_sent(shards: Shards, reach: int) -> int:
    """Return how many rows a rank sends, the mean over ranks, rounded up."""
    return -(-len(_transfers(shards, reach)[0]) // shards.degree)


def _transfers(shards: Shards, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all transfers, int64: the rank that reads, the token, and its place in the ranks' rows set end to end.

    By reader, then by token.
    """
    place = shards.places()
    holder = place // shards.tokens_local
    source = earlier_rows(shards.rows, shards.rows, reach)
    reader = holder.expand(reach, -1)
    remote = (source >= 0) & (holder[source.clamp(min=0)] != reader)
    transfers = (reader[remote] * len(shards.rows) + source[remote]).unique()
    token = transfers % max(len(shards.rows), 1)
    return transfers // max(len(shards.rows), 1), token, place[token]

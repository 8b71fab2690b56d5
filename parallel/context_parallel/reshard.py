"""Redealing: rows change ranks so that each rank holds a stretch of the sequence, and come back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reshard:
    """Where the local rows go and what comes instead, planned for one rank.

    leaving: local rows, int64, those to rank 0 first. slots: where what arrives belongs, those from rank 0 first.
    sent, received: rows to and from each rank. here, there: rows of this rank before and after.
    """

    leaving: Tensor
    slots: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    here: int
    there: int

    @staticmethod
    def plan(shards: Shards, target: Shards, rank: int) -> "Reshard":
        """Plan from how a sequence is dealt to how it is to be."""
        degree, here, there = shards.degree, shards.tokens_local, target.tokens_local
        source_place, target_place = shards.places(), target.places()
        mine, coming = (dealt.index[rank][dealt.index[rank] >= 0] for dealt in (shards, target))
        to, source = target_place[mine] // there, source_place[coming] // here
        outgoing = mine[target_place[mine].argsort()]
        return Reshard(
            leaving=source_place[outgoing] % here,
            slots=(target_place[coming] % there)[source.argsort(stable=True)],
            sent=tuple(to.bincount(minlength=degree).tolist()),
            received=tuple(source.bincount(minlength=degree).tolist()),
            here=here,
            there=there,
        )

    def moved_rows(self, rank: int) -> tuple[int, int]:
        """Return how many rows go to other ranks, and how many come from them."""
        return sum(self.sent) - self.sent[rank], sum(self.received) - self.received[rank]

    def go(self, parts: Sequence[Tensor], channel: Channel, *, kind: str) -> list[Tensor]:
        """Return `[there, heads, width]` tensors of such `[here, heads, width]`; rows that nobody sent are 0."""
        packed = torch.cat([part.flatten(1) for part in parts], dim=1)
        outgoing = packed[self.leaving.to(packed.device)]
        arrived = channel.all_to_all_uneven(outgoing, sent=self.sent, received=self.received, kind=kind)
        return _placed(arrived, self.slots, self.there, parts)

    def come_back(self, parts: Sequence[Tensor], channel: Channel, *, kind: str) -> list[Tensor]:
        """Return `[here, heads, width]` tensors of such `[there, heads, width]`: the way of `go` backwards."""
        packed = torch.cat([part.flatten(1) for part in parts], dim=1)
        outgoing = packed[self.slots.to(packed.device)]
        arrived = channel.all_to_all_uneven(outgoing, sent=self.received, received=self.sent, kind=kind)
        return _placed(arrived, self.leaving, self.here, parts)


def _placed(arrived: Tensor, slots: Tensor, rows: int, like: Sequence[Tensor]) -> list[Tensor]:
    placed = arrived.new_zeros(rows, arrived.shape[1])
    placed[slots.to(placed.device)] = arrived
    parts = placed.split([part.shape[1:].numel() for part in like], dim=1)
    return [part.unflatten(1, of.shape[1:]) for part, of in zip(parts, like, strict=True)]

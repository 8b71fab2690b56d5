"""Resharding: rows change ranks, from one layout of a sequence to another, and results change back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.device_copies import DeviceCopies
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reshard:
    """The rows that one rank sends and receives when a sequence changes its layout.

    leaving: local rows before, int64, those to rank 0 first. arriving: local rows after, those from rank 0 first.
    sent, received: rows to and from each rank. rows_before, rows_after: of this rank, padding included.
    """

    leaving: DeviceCopies
    arriving: DeviceCopies
    sent: tuple[int, ...]
    received: tuple[int, ...]
    rows_before: int
    rows_after: int

    @staticmethod
    def plan(source: Shards, target: Shards, rank: int) -> "Reshard":
        before, after = source.tokens_local, target.tokens_local
        source_slots, target_slots = source.slots(), target.slots()
        tokens_before, tokens_after = (shards.index[rank][shards.index[rank] >= 0] for shards in (source, target))
        to_rank, from_rank = target_slots[tokens_before] // after, source_slots[tokens_after] // before
        # Rows to one rank leave in the order in which it holds them, so both sides need no further agreement.
        outgoing = tokens_before[target_slots[tokens_before].argsort()]
        return Reshard(
            leaving=DeviceCopies(source_slots[outgoing] % before),
            arriving=DeviceCopies((target_slots[tokens_after] % after)[from_rank.argsort(stable=True)]),
            sent=tuple(to_rank.bincount(minlength=source.degree).tolist()),
            received=tuple(from_rank.bincount(minlength=source.degree).tolist()),
            rows_before=before,
            rows_after=after,
        )

    def moved_rows(self, rank: int) -> tuple[int, int]:
        """Return how many rows go to other ranks, and how many come from them."""
        return sum(self.sent) - self.sent[rank], sum(self.received) - self.received[rank]

    def apply(self, tensors: Sequence[Tensor], channel: Channel, *, kind: str) -> list[Tensor]:
        """Reshard tensors `[rows_before, heads, width]` to `[rows_after, heads, width]`; padding rows are 0."""
        packed = torch.cat([x.flatten(1) for x in tensors], dim=1)  # [T, heads, width] -> [T, sum of heads * width]
        outgoing = packed[self.leaving.on(packed.device)]
        arrived = channel.start_all_to_all(outgoing, sent=self.sent, received=self.received, kind=kind).wait()
        resharded = packed.new_zeros(self.rows_after, packed.shape[1])
        resharded[self.arriving.on(packed.device)] = arrived
        parts = resharded.split([x.shape[1:].numel() for x in tensors], dim=1)
        # [T, heads * width] -> [T, heads, width]
        return [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True)]

    def undo(self, tensors: Sequence[Tensor], channel: Channel, *, kind: str) -> list[Tensor]:
        """Reshard tensors `[rows_after, heads, width]` back to `[rows_before, heads, width]`."""
        inverse = Reshard(
            leaving=self.arriving,
            arriving=self.leaving,
            sent=self.received,
            received=self.sent,
            rows_before=self.rows_after,
            rows_after=self.rows_before,
        )
        return inverse.apply(tensors, channel, kind=kind)

"""Heads for tokens: an all-to-all turns each rank's tokens of all heads into all tokens of its heads, and back.

Where there are fewer KV heads than ranks, each is sent to all ranks whose query heads share it, and the gradients of
these replicas are summed in the accumulation dtype at home.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Heads, HeadShare, RoutingSource, Saved, SequenceAttention, Sizes, no_routing
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.strategy import (
    DistributedAttention,
    Move,
    Queries,
    Volume,
)


def heads_unsupported_reason(strategy: str, setting: str, heads: Heads, degree: int) -> str | None:
    """Return why heads cannot be dealt to `degree` ranks, and to how many they can; None if they can."""

    def deals(n: int) -> bool:
        return heads.query % n == 0 and (heads.kv % n == 0 or n % heads.kv == 0)

    works = [n for n in range(1, heads.query + 1) if deals(n)]
    if degree in works:
        return None
    return (
        f"strategy {strategy!r} cannot deal {heads.query} query heads and {heads.kv} KV heads to "
        f"{setting}={degree} ranks; these degrees work: {', '.join(map(str, works))}."
    )


def local_heads(share: HeadShare, channel: Channel) -> HeadShare:
    """Return the heads, of a share, that this rank of the channel attends to."""
    local = len(share.head_range) // channel.size
    start = share.head_range.start + channel.rank * local
    return HeadShare(all_heads=share.all_heads, head_range=range(start, start + local))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reordering:
    """Puts rows in another order, and back; both None where they are in it already."""

    order: Tensor | None
    inverse: Tensor | None

    @staticmethod
    def of(order: Tensor) -> "Reordering":
        if torch.equal(order, torch.arange(len(order))):
            return Reordering(None, None)
        return Reordering(order, order.argsort())

    def apply(self, x: Tensor) -> Tensor:
        """Return the rows of `x` at `order`."""
        return x if self.order is None else x[self.order.to(x.device)]

    def undo(self, x: Tensor) -> Tensor:
        """Return what `apply` made `x` of."""
        return x if self.inverse is None else x[self.inverse.to(x.device)]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class HeadParallelAttention(DistributedAttention):
    """Attention of `inside` to the tokens of all ranks of a channel, with some of the heads each.

    tokens: of the sequence, behind each row that `inside` has. reordering: to these, of the ranks' rows set end to end.
    share: the heads of this rank.
    rounded: gradients of replicas travel in the dtype of keys.
    """

    name: str
    channel: Channel
    tokens: Tensor
    reordering: Reordering
    inside: SequenceAttention
    share: HeadShare
    rounded: bool

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        by_rank = [_heads_by_rank(x, self.channel.size) for x in inputs]
        mine = self._gather_tokens(by_rank[:3], kind="qkv")
        mine += self._gather_tokens(by_rank[3:], kind="routing")
        my_out, saved = self.inside.forward(*mine)
        (out,) = self._scatter_tokens([my_out], kind="out")
        return out.flatten(1, 2), saved

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        (my_dout,) = self._gather_tokens([_heads_by_rank(dout, self.channel.size)], kind="dout")
        gradients = list(self.inside.backward(my_dout, saved))
        del my_dout
        wire = accumulation_dtype(dout.dtype) if self._sums_replicas else dout.dtype
        (dq,) = self._scatter_tokens([gradients.pop(0).to(dout.dtype)], kind="dq")
        of_keys = self._scatter_tokens([gradients.pop(0).to(wire) for _ in ("dk", "dv")], kind="dkv")
        of_keys += self._scatter_tokens(gradients, kind="drouting")
        return dq.flatten(1, 2), *(_sum_replicas(gradient, self.heads.kv) for gradient in of_keys)

    def lse(self, saved: Saved) -> Tensor | None:
        mine = self.inside.lse(saved)
        if mine is None:
            return None
        (lse,) = self._scatter_tokens([mine.unsqueeze(-1)], kind="lse")
        return lse.flatten(1)

    @property
    def _sums_replicas(self) -> bool:
        """Whether gradients are summed that did not travel rounded."""
        return self.channel.size > self.heads.kv and not self.rounded

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """Each way (P-1)/P of q, k, v, routing and out, with max(Hk, P) KV heads, and what is sent inside.

        The gradients of replicated keys and values move in the accumulation dtype unless they are rounded.
        """
        degree, elements = self.channel.size, sizes.element_bytes
        queries = self.heads.query * sizes.kv_width * elements
        keys = max(self.heads.kv, degree) * sizes.kv_width
        of_routing = max(self.heads.kv, degree) * self.routing_width * sizes.accumulation_bytes
        gradients = keys * (sizes.accumulation_bytes if self._sums_replicas else elements)
        forward, backward = (
            (degree - 1) * (self.tokens_local * (queries + of_keys + of_routing) // degree)
            for of_keys in (keys * elements, gradients)
        )
        exchanged = Move(Volume(forward=forward, backward=backward), self.channel, hidden=False)
        return exchanged, *(
            self.inside.moves(sizes, self._of_share(routing)) if isinstance(self.inside, DistributedAttention) else ()
        )

    @property
    def queries(self) -> Queries:
        if isinstance(self.inside, DistributedAttention):
            return self.inside.queries
        return Queries(self.tokens, len(self.share.head_range))

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """q, k, v, out and, backward, their gradients as they are summed, of all tokens of this rank's heads."""
        here = self.share.local_heads
        width = (here.query + here.kv) * sizes.kv_width * (sizes.element_bytes + sizes.accumulation_bytes)
        inside = (
            self.inside.working_bytes(sizes, self._of_share(routing))
            if isinstance(self.inside, DistributedAttention)
            else 0
        )
        return len(self.tokens) * width + inside

    def _of_share(self, routing: RoutingSource) -> RoutingSource:
        """Return the routing of this rank's heads."""
        return lambda: routing().of_heads(self.share)

    def _gather_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """Exchange `[tokens_local, P, heads, width]` tensors for this rank's heads of all tokens, in `order`."""
        if not parts:
            return []
        shapes = [part.shape[2:] for part in parts]
        to_ranks = parts[0].new_empty(self.channel.size, self.tokens_local, sum(shape.numel() for shape in shapes))
        for place, part in zip(_split_heads(to_ranks, shapes), parts, strict=True):
            place.copy_(part.transpose(0, 1))
        received = self.channel.all_to_all(to_ranks, kind=f"{self.name}_{kind}").flatten(0, 1)
        del to_ranks
        return _split_heads(self.reordering.apply(received), shapes)  # [tokens, heads, width]

    def _scatter_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """The way back: this rank's heads of all tokens for `[tokens_local, P, heads, width]`, all ranks' heads.

        `parts` is emptied, so that what was sent is not held any longer.
        """
        if not parts:
            return []
        shapes = [part.shape[1:] for part in parts]
        by_row = parts[0].new_empty(len(self.tokens), sum(shape.numel() for shape in shapes))
        for place in _split_heads(by_row, shapes):
            place.copy_(self.reordering.undo(parts.pop(0)))
        by_rank = by_row.unflatten(0, (self.channel.size, -1))
        received = self.channel.all_to_all(by_rank, kind=f"{self.name}_{kind}").transpose(0, 1)
        return _split_heads(received, shapes)  # [tokens_local, P, ...]


def _split_heads(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Split the last dimension into one tensor `[..., heads, width]` per (heads, width)."""
    parts = packed.split([shape.numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _heads_by_rank(x: Tensor, degree: int) -> Tensor:
    """Return `[tokens, P, heads per rank, width]`; heads fewer than ranks are repeated for neighboring ranks."""
    return x.repeat_interleave(max(degree // x.shape[1], 1), dim=1).unflatten(1, (degree, -1))


def _sum_replicas(gradient: Tensor, heads: int) -> Tensor:
    """Sum gradients `[tokens, P, heads per rank, width]` of repeated heads into `[tokens, heads, width]`."""
    if heads >= gradient.shape[1]:
        return gradient.flatten(1, 2)
    return gradient.flatten(1, 2).to(accumulation_dtype(gradient.dtype)).unflatten(1, (heads, -1)).sum(dim=2)

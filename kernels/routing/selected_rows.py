"""Rows that KV heads select of a sequence, collected from their tokens, and scattered back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.planner import AttentionPlanner, SequenceAttention


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SelectedRows:
    """Attention among selected rows, and the local tokens behind them.

    source: of each KV head of each row, token * Hk + head among the local ones, int64 `[rows x heads]`; any where
    there is none, which is `absent`, bool `[rows x heads]`, None if there is always one. target: the same, but T * Hk
    where there is none. heads: KV heads of a row. share: plans the rows where each owner has a share of them, the
    above being of the rows of all owners end to end; None where rows lie with their tokens.
    """

    among: SequenceAttention
    source: Tensor
    absent: Tensor | None
    target: Tensor
    heads: int
    share: AttentionPlanner | None

    @staticmethod
    def of(
        among: SequenceAttention, place: Tensor, pairs: int, *, is_full: bool, share: AttentionPlanner | None = None
    ) -> "SelectedRows":
        """Return these rows; place: as `source`, `[rows, heads]`, -1 where there is none. pairs: T * Hk."""
        heads, place = place.shape[1], place.flatten()
        if is_full:
            return SelectedRows(among=among, source=place, absent=None, target=place, heads=heads, share=share)
        absent = place < 0
        source, target = place.clamp(min=0), place.masked_fill(absent, pairs)
        return SelectedRows(among=among, source=source, absent=absent, target=target, heads=heads, share=share)

    def collect(self, kv_heads: int, *tensors: Tensor) -> list[Tensor]:
        """Return this owner's rows `[rows, heads x G, width]` of x `[T, Hk x G, width]`; 0 where there is no token.

        Tensors of one dtype, which go to other owners in one message.
        """
        found = []
        for x in tensors:
            # [T, Hk x G, width] -> [T x Hk, G, width] -> [rows x heads, G, width] -> [rows, heads x G, width]
            pairs = x.unflatten(1, (kv_heads, -1)).flatten(0, 1)
            # An owner without tokens has no pair that could stand for none.
            if len(pairs):
                of_heads = pairs.index_select(0, self.source)
            else:
                of_heads = pairs.new_zeros(len(self.source), *pairs.shape[1:])
            if self.absent is not None:
                of_heads.masked_fill_(self.absent[:, None, None], 0.0)
            found.append(of_heads.unflatten(0, (-1, self.heads)).flatten(1, 2))
        share = self.share
        return found if share is None else _in_one(found, lambda x: share.reduce_scatter(x, kind="selected"))

    def scatter(self, kv_heads: int, *given: tuple[Tensor, Sequence[int]], fill: float = 0.0) -> list[Tensor]:
        """Return `[T, Hk x G, width]` of each x as collected and the first two of this shape; the rest is `fill`."""
        share, tensors = self.share, [x for x, _ in given]
        if share is not None:
            tensors = _in_one(tensors, lambda x: share.all_gather(x, kind="selected"))
        scattered = []
        for x, (_, shape) in zip(tensors, given, strict=True):
            # Each pair of a token and a head occurs at most once, so that nothing is summed. One more takes all others.
            pairs, group = shape[0] * kv_heads, shape[1] // kv_heads
            full = x.new_full((pairs + 1, group, x.shape[2]), fill)
            # [rows, heads x G, width] -> [rows x heads, G, width]
            full.index_copy_(0, self.target, x.unflatten(1, (-1, group)).flatten(0, 1))
            # [T x Hk, G, width] -> [T, Hk x G, width]
            scattered.append(full[:pairs].unflatten(0, (shape[0], kv_heads)).flatten(1, 2))
        return scattered


def _in_one(tensors: Sequence[Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Move tensors `[rows, heads, width]` in one message."""
    # [rows, heads, width] -> [rows, heads x width], side by side, and back
    moved = move(torch.cat([x.flatten(1) for x in tensors], dim=1))
    parts = moved.split([x.shape[1:].numel() for x in tensors], dim=1)
    return [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, tensors, strict=True)]

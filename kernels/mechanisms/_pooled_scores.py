"""Choices of whole tiles of queries by pooled scores: what the block-sparse selection policies have in common."""

from collections.abc import Iterator

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.routing.ranking import affinity, sortable

SCORES_AT_ONCE = 1 << 23
"""Pooled scores that are held at the same time."""
ONE = 1 << 40
"""Weights of a softmax are counted in this part of the highest: sums of integers do not depend on their order."""


def candidates(local_shard: LocalShard, units: Tensor, *, causal: bool) -> Tensor:
    """Return which blocks each held tile may choose, bool `[units, blocks]`: of its document, and not all later."""
    tiles, blocks = local_shard.query_block_extent, local_shard.key_block_extent
    tile = local_shard.local_query_blocks[0][units]
    may = (tiles.document[tile, None] == blocks.document) & (blocks.last >= 0)
    return may & (blocks.first <= tiles.last[tile, None]) if causal else may


def scaled_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Return float32 `[Hq, units, blocks]` of float32 means `[units, Hq, D]` and `[blocks, Hk, D]`: q . k / sqrt(D)."""
    return affinity(queries, keys) * queries.shape[-1] ** -0.5


def few_units(local_shard: LocalShard, heads: int) -> Iterator[Tensor]:
    """Yield the places of the held tiles, a few at a time, so that no more than SCORES_AT_ONCE belong to them."""
    if len(local_shard.local_query_blocks[0]):
        count = max(SCORES_AT_ONCE // (heads * local_shard.key_blocks.count), 1)
        yield from torch.arange(len(local_shard.local_query_blocks[0])).split(count)


def best(scores: Tensor, allowed: Tensor, *, at_least: Tensor, mass: float | None) -> Tensor:
    """Return the best blocks of each row of float32 scores `[Hq, units, blocks]`, bool of the same shape.

    Of those `allowed`, bool `[Hq or 1, units, blocks]`, as many as fit into `mass` of their softmax, the one that
    exceeds it left out; never fewer than `at_least`, int64 `[units]`, nor than one. The lower block wins a tie.
    """
    masked = scores.masked_fill(~allowed, float("-inf"))
    order = (-sortable(masked)).sort(dim=-1, stable=True).indices
    count = at_least.clamp(min=1)[:, None].expand((*masked.shape[:2], 1))
    if mass is not None:
        top = masked.amax(dim=-1, keepdim=True)
        weight = ((masked.double() - top.masked_fill(top == float("-inf"), 0.0)).exp() * ONE).round().long()
        cumulative = weight.gather(-1, order).cumsum(-1)
        limit = (cumulative[..., -1:].double() * mass).floor().long()
        count = torch.maximum(count, (cumulative <= limit).sum(dim=-1, keepdim=True))
    place = torch.arange(masked.shape[-1], device=scores.device)
    chosen = torch.zeros_like(masked, dtype=torch.bool).scatter_(-1, order, place < count)
    return chosen & allowed


def selected(local_shard: LocalShard, masks: Iterator[Tensor], heads: int) -> BlockSelection:
    """Return the selection of the held tiles by masks `[heads, some units, blocks]`, in the order of the units."""
    none = torch.zeros(heads, 0, local_shard.key_blocks.count, dtype=torch.bool)
    return BlockSelection.from_parts(local_shard.local_query_blocks[1], local_shard.key_blocks, [none, *masks])

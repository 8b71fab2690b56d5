"""Selections by tiles of queries with pooled scores: the parts that block-sparse policies share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.routing.ranking import affinity, sortable

SCORES_AT_ONCE = 1 << 23
"""Pooled scores that exist at the same time."""
ONE = 1 << 40
"""Softmax weights are integers, this much for the highest: sums of integers do not depend on their order."""


def candidate_blocks(local_shard: LocalShard, local_tiles: Tensor, blocks: slice, *, causal: bool) -> Tensor:
    """Return which of `blocks` local tiles may select, bool `[tiles, blocks]`: in their document, begun by then."""
    tile, (first_key, last_key) = local_shard.local_query_blocks[0][local_tiles], local_shard.key_block_extent
    first_key, last_key = first_key[blocks], last_key[blocks]
    allowed = local_shard.query_blocks.document[tile, None] == local_shard.key_blocks.document[blocks]
    allowed &= last_key >= 0
    return allowed & (first_key <= local_shard.query_block_extent[1][tile, None]) if causal else allowed


def scaled_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """q . k / sqrt(D), float32 `[Hq, tiles, blocks]`, of float32 means `[tiles, Hq, D]` and `[blocks, Hk, D]`."""
    return affinity(queries, keys) * queries.shape[-1] ** -0.5


def tile_chunks(local_shard: LocalShard, heads: int) -> Iterator[tuple[Tensor, slice]]:
    """Yield the indices of some local tiles, as many as SCORES_AT_ONCE allows, and the blocks of their documents."""
    tiles = local_shard.local_query_blocks[0]
    if len(tiles):
        document = local_shard.query_blocks.document[tiles]
        for chunk in torch.arange(len(tiles)).split(max(SCORES_AT_ONCE // (heads * local_shard.key_blocks.count), 1)):
            yield chunk, local_shard.key_blocks.span(document[chunk])


def best_blocks(scores: Tensor, allowed: Tensor, *, at_least: Tensor, mass: float | None) -> Tensor:
    """The best blocks of each row of float32 scores `[Hq, tiles, blocks]`, bool of the same shape.

    Among those `allowed`, bool `[Hq or 1, tiles, blocks]`, as many as fit into `mass` of their softmax, without the one
    that exceeds it; never fewer than `at_least`, int64 `[tiles]`, nor than one. The lower block wins a tie.
    """
    masked = scores.masked_fill(~allowed, float("-inf"))
    # A stable sort of integers: ties go to the lower block on every device.
    order = (-sortable(masked)).sort(dim=-1, stable=True).indices
    count = at_least.clamp(min=1)[:, None].expand((*masked.shape[:2], 1))  # [tiles] -> [Hq, tiles, 1]
    if mass is not None:
        top = masked.amax(dim=-1, keepdim=True)
        weight = ((masked.double() - top.masked_fill(top == float("-inf"), 0.0)).exp() * ONE).round().long()
        cumulative = weight.gather(-1, order).cumsum(-1)
        limit = (cumulative[..., -1:].double() * mass).floor().long()
        count = torch.maximum(count, (cumulative <= limit).sum(dim=-1, keepdim=True))
    rank = torch.arange(masked.shape[-1], device=scores.device)
    # From ranks back to blocks.
    selected = torch.zeros_like(masked, dtype=torch.bool).scatter_(-1, order, rank < count)
    return selected & allowed


def selection_of_tiles(local_shard: LocalShard, masks: Iterator[tuple[slice, Tensor]], heads: int) -> BlockSelection:
    """The selection of the local tiles by masks `[heads, some tiles, some blocks]`, in the order of the tiles."""
    query_block = local_shard.local_query_blocks[1]
    return BlockSelection.from_parts(query_block, local_shard.key_blocks, masks, heads=heads)

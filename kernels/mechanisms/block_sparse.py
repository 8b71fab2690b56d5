"""Block-sparse attention by a pattern: tiles of queries attend to blocks of keys that a mask or a density names.

The mask is one for all heads and documents. Without one, blocks are drawn: each KV head and tile takes its own block
and a share of the other blocks that it may see, spread evenly, one at random in each stretch (the block-sparse kernels
of Sparse Transformers, arXiv 1904.10509, and their kin are timed on such patterns).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms._pooled_scores import candidates, few_units, selected
from farspan.kernels.planner import Heads

TILES_AT_ONCE = 1 << 10
"""Tiles whose blocks are drawn at the same time."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSparse(Routed):
    """block: tokens of a tile of queries and of a block of keys. causal: later tokens are hidden.

    mask: a string of 0 and 1 for each tile of a document, one character per block: 1 where it attends; blocks beyond
    its end are not attended to. density and seed, where there is no mask: the share of blocks that is drawn.
    """

    block: int = 128
    density: float = 0.1
    seed: int = 0
    mask: tuple[str, ...] = ()
    causal: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1")
        for number, row in enumerate(self.mask):
            if set(row) - {"0", "1"}:
                raise ValueError(f"mask[{number}]={row!r} must be made of 0 and 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(block=32, density=0.4),
            cls(block=32, causal=False, mask=("1", "011", "1", "0011", "", "1", "1", "1", "01", "1", "111")),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {f"block_sparse_{share}": cls(density=share / 100) for share in (5, 10, 25)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=self.causal)

    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.blocks(global_rows, self.block)

    def query_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.blocks(global_rows, self.block)

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        tiles = -(-longest // self.block)
        return self._too_few(tiles) if self.mask and tiles > len(self.mask) else None

    def _too_few(self, tiles: int) -> str:
        return f"mask has {len(self.mask)} tiles, but a document has {tiles}: give a row for each"

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        """Blocks that a row's tile has, as given or as many as are drawn, times `block`; its own up to the row."""
        place, real = global_rows.position.long(), global_rows.document >= 0
        tile, inside = place // self.block, place % self.block
        longest = int(place.max()) // self.block + 1 if len(place) else 1
        own = inside + 1 if self.causal else torch.full_like(inside, self.block)
        if self.mask:
            given = torch.tensor([[c == "1" for c in row.ljust(longest, "0")[:longest]] for row in self.mask])
            if self.causal:
                given = given.tril()
            has_own = given.diagonal()[tile.clamp(max=len(given) - 1)]
            others = given.sum(dim=1)[tile.clamp(max=len(given) - 1)] - has_own.long()
            return (others * self.block + has_own * own).masked_fill(~real, 0).double()
        ids = global_rows.document.clamp(min=0).long()
        tiles = (torch.bincount(ids, weights=real.double()).long() + self.block - 1) // self.block
        others = tile if self.causal else tiles[ids] - 1
        drawn = ((others + 1) * self.density).round().long().clamp(min=1) - 1
        return (drawn * self.block + own).masked_fill(~real, 0).double()

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        if self.mask:
            return selected(local_shard, self._given(local_shard), k.shape[1])
        return self._drawn(local_shard)

    def _given(self, local_shard: LocalShard) -> Iterator[Tensor]:
        blocks, kv_heads = local_shard.key_blocks, len(local_shard.kv_heads)
        longest = int(blocks.first.diff().max()) if len(blocks.documents) else 0
        if longest > len(self.mask):
            raise ValueError(self._too_few(longest))
        rows = [[c == "1" for c in row.ljust(longest, "0")[:longest]] for row in self.mask]
        table, number = torch.tensor(rows, dtype=torch.bool), blocks.number
        for units in few_units(local_shard, kv_heads):
            tile = local_shard.local_query_blocks[0][units]
            mask = table[number[tile][:, None], number] & candidates(local_shard, units, causal=self.causal)
            yield mask.expand(kv_heads, -1, -1)

    def _drawn(self, local_shard: LocalShard) -> BlockSelection:
        """Draw without a mask of all blocks, a few tiles at a time, so that memory follows what is drawn."""
        blocks, tiles = local_shard.key_blocks, local_shard.local_query_blocks[0]
        sizes = blocks.first.diff()
        first, stop = (edge.repeat_interleave(sizes) for edge in (blocks.first[:-1], blocks.first[1:]))
        count, chosen = [], []
        for head in local_shard.kv_heads:
            for tile in tiles.split(TILES_AT_ONCE):
                others = (tile + 1 if self.causal else stop[tile]) - first[tile] - 1
                drawn = ((others + 1) * self.density).round().long().clamp(min=1) - 1
                count.append(drawn + 1)
                chosen.append(self._draw(head, tile, first[tile], others, drawn))
        return BlockSelection.from_ragged(
            local_shard.local_query_blocks[1], blocks, count, chosen, heads=len(local_shard.kv_heads)
        )

    def _draw(self, head: int, tile: Tensor, first: Tensor, others: Tensor, drawn: Tensor) -> Tensor:
        """Return the blocks of tiles, ascending in each: of each stretch of its other blocks one, and its own."""
        number = torch.arange(len(tile)).repeat_interleave(drawn)
        nth = torch.arange(len(number)) - (drawn.cumsum(0) - drawn)[number]
        low = nth * others[number] // drawn[number]
        width = (nth + 1) * others[number] // drawn[number] - low
        other = first[number] + low + _noise(self.seed, head, tile[number], nth) % width
        # The tile's own block is left out of the count, and put in here.
        block = torch.cat((other + (other >= tile[number]), tile))
        number = torch.cat((number, torch.arange(len(tile))))
        return ((number << 32) + block).sort().values.bitwise_and(0xFFFFFFFF).int()


def _noise(seed: int, head: int, tile: Tensor, nth: Tensor) -> Tensor:
    """Return int64 from 0 to 2^31 - 1 that look random, the same wherever they are drawn (SplitMix64's mixing)."""
    x = (tile << 32) + nth + (seed * 1_000_003 + head) * 0x1E3779B97F4A7C15 % (1 << 62)
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 29 & 0x7FFFFFFFF)) * factor
    return (x >> 32) & 0x7FFFFFFF


MECHANISMS.add("block_sparse", BlockSparse)

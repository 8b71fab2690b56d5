"""Block-sparse attention by a fixed pattern: a mask or a density says which blocks of keys tiles of queries attend to.

A mask holds for all heads and documents. Without one, blocks are drawn: each KV head and tile takes its own block and a
share of the other blocks that it may see, evenly spaced, one at random from each interval (the block-sparse kernels of
Sparse Transformers, arXiv 1904.10509, and their kin are timed on such patterns).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms import _tile_selection as by_tile
from farspan.kernels.planner import Heads
from farspan.kernels.ragged import expand, offsets_of

TILES_AT_ONCE = 1 << 10
"""Tiles whose blocks are drawn at once."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSparse(Routed):
    """Tiles and blocks of one size, selected by a pattern."""

    block: int = 128
    """Tokens in a tile of queries and in a block of keys."""
    density: float = 0.1
    """Share of the visible blocks that is drawn where there is no mask."""
    seed: int = 0
    """Seed of the drawn blocks."""
    mask: tuple[str, ...] = ()
    """One string per tile of a document, one character per block: 1 where the tile attends; missing ones count as 0."""
    causal: bool = True
    """Whether later tokens are hidden."""

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
        """The tile's other blocks, given or drawn, times `block`, and the visible part of its own block."""
        position, real = global_rows.position.long(), global_rows.document >= 0
        tile, inside = position // self.block, position % self.block
        longest = int(position.max()) // self.block + 1 if len(position) else 1
        own = inside + 1 if self.causal else torch.full_like(inside, self.block)
        if self.mask:
            given = self._mask_table(longest)
            if self.causal:
                given = given.tril()
            tile = tile.clamp(max=len(given) - 1)
            has_own = given.diagonal()[tile]
            others, own = given.sum(dim=1)[tile] - has_own.long(), has_own * own
        else:
            tiles = (global_rows.document_length() + self.block - 1) // self.block
            others = self._num_drawn(tile if self.causal else tiles - 1)
        return (others * self.block + own).masked_fill(~real, 0).double()

    def kept_bytes(self, heads: Heads, global_rows: Rows, *, tokens: int, packed: bool) -> int:
        """Layers share the pattern."""
        return 0

    def selects_all_of(self, blocks: int) -> bool:
        if not self.mask:
            # The tile that sees most blocks draws the smallest share of them, once rounded.
            others = torch.tensor(blocks - 1)
            return bool(self._num_drawn(others) >= others)
        visible = torch.ones(blocks, blocks, dtype=torch.bool)
        return bool((self._mask_table(blocks)[:blocks] | ~(visible.tril() if self.causal else visible)).all())

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        return self._pattern(local_shard)

    def select_packed(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> PackedSelection:
        return self.prepare(local_shard, q.device)

    def prepare(self, local_shard: LocalShard, device: torch.device) -> PackedSelection:
        return local_shard.once(("pattern", device), lambda: PackedSelection.pack(self._pattern(local_shard), device))

    def _pattern(self, local_shard: LocalShard) -> BlockSelection:
        # The same in all layers that share the shard.
        return local_shard.once("pattern", lambda: (self._given if self.mask else self._drawn)(local_shard))

    def _mask_table(self, blocks: int) -> Tensor:
        """The mask as bool `[tiles, blocks]`."""
        rows = [[c == "1" for c in row.ljust(blocks, "0")[:blocks]] for row in self.mask]
        return torch.tensor(rows, dtype=torch.bool)

    def _num_drawn(self, others: Tensor) -> Tensor:
        """Blocks drawn besides a tile's own, of `others` other visible ones, int64."""
        return ((others + 1) * self.density).round().long().clamp(min=1) - 1

    def _given(self, local_shard: LocalShard) -> BlockSelection:
        blocks, kv_heads = local_shard.key_blocks, len(local_shard.share.kv_heads)
        longest = int(blocks.first.diff().max()) if len(blocks.documents) else 0
        if longest > len(self.mask):
            raise ValueError(self._too_few(longest))
        table, number = self._mask_table(longest), blocks.number

        def masks() -> Iterator[tuple[slice, Tensor]]:
            for chunk, some in by_tile.tile_chunks(local_shard, kv_heads):
                tile = local_shard.local_query_blocks[0][chunk]
                allowed = by_tile.candidate_blocks(local_shard, chunk, some, causal=self.causal)
                # [tiles, 1] and [blocks] -> [tiles, blocks]: numbers inside the document on both sides
                yield some, (table[number[tile][:, None], number[some]] & allowed).expand(kv_heads, -1, -1)

        return by_tile.selection_of_tiles(local_shard, masks(), kv_heads)

    def _drawn(self, local_shard: LocalShard) -> BlockSelection:
        """Draw lists instead of a mask of all blocks, a few tiles at a time: memory follows the blocks drawn."""
        blocks, (tiles, query_block) = local_shard.key_blocks, local_shard.local_query_blocks
        # The first block of each block's document, and the last plus 1.
        first, stop = blocks.first[blocks.document], blocks.first[blocks.document + 1]
        counts, key_blocks = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int32)]
        for head in local_shard.share.kv_heads:
            for tile in tiles.split(TILES_AT_ONCE):
                others = (tile + 1 if self.causal else stop[tile]) - first[tile] - 1
                drawn = self._num_drawn(others)
                counts.append(drawn + 1)
                key_blocks.append(self._draw(head, tile, first[tile], others, drawn))
        return BlockSelection(
            heads=len(local_shard.share.kv_heads),
            query_block=query_block,
            blocks=blocks,
            offsets=offsets_of(torch.cat(counts)),
            key_blocks=torch.cat(key_blocks),
        )

    def _draw(self, head: int, tile: Tensor, first: Tensor, others: Tensor, drawn: Tensor) -> Tensor:
        """The blocks of tiles, ascending in each: one of each interval of its other blocks, and its own."""
        number, nth = expand(drawn)
        low = nth * others[number] // drawn[number]
        width = (nth + 1) * others[number] // drawn[number] - low
        other = first[number] + low + _noise(self.seed, head, tile[number], nth) % width
        # Intervals skip the tile's own block, which is added here.
        block = torch.cat((other + (other >= tile[number]), tile))
        number = torch.cat((number, torch.arange(len(tile))))
        # Sorted by tile, then by block, as one int64.
        return ((number << 32) + block).sort().values.bitwise_and(0xFFFFFFFF).int()


def _noise(seed: int, head: int, tile: Tensor, nth: Tensor) -> Tensor:
    """Pseudo-random int64 from 0 to 2^31 - 1, the same wherever they are drawn (SplitMix64's mixing)."""
    x = (tile << 32) + nth + (seed * 1_000_003 + head) * 0x1E3779B97F4A7C15 % (1 << 62)
    for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 29 & 0x7FFFFFFFF)) * factor
    return (x >> 32) & 0x7FFFFFFF


MECHANISMS.add("block_sparse", BlockSparse)

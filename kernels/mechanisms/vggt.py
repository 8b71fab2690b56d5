"""Block-sparse global attention for VGGT (arXiv 2509.07120, section 4): pooled softmax, dense special tokens.

A document is a sequence of frames; each begins with special tokens (camera, registers), the rest are patches. Patches
are pooled by tiles of queries and blocks of keys; a tile selects the blocks with the highest pooled scores, up to a
share of their softmax and at least a share of the blocks. Special tokens attend to all and are attended to by all.
Reference semantics: the published code, where special keys have blocks of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms import _tile_selection as by_tile
from farspan.kernels.mechanisms._block_choice import BlockChoice, BlockChooser, Queries, longest
from farspan.kernels.planner import Heads
from farspan.kernels.planning.choice_tiles import Ranking

MASS_MARGIN = 1e-5
"""Added to `mass`, as in the published code, against rounding in the cumulative sum."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class VGGT(BlockChooser):
    """Tiles of patches select blocks of patches; defaults are those of the published example."""

    frame: int = 0
    """Tokens per frame; 0 for no frames: all tokens are patches."""
    special: int = 0
    """Special tokens at the start of each frame."""
    mass: float = 0.97
    """Share of the softmax that is selected."""
    sparsity: float = 0.1
    """Largest share of a document's patch blocks that is left out; the rest is selected in any case."""
    tile: int = 128
    """Queries that share a selection."""
    block: int = 64
    """Keys per block."""

    def __post_init__(self) -> None:
        if self.tile < 1 or self.block < 1:
            raise ValueError(f"tile={self.tile} and block={self.block} must be at least 1")
        if self.frame < 0:
            raise ValueError(f"frame={self.frame} must be at least 0, which is no frames")
        if not (0 <= self.mass <= 1 and 0 <= self.sparsity <= 1):
            raise ValueError(f"mass={self.mass} and sparsity={self.sparsity} must be from 0 to 1")
        if not 0 <= self.special <= max(self.frame - 1, 0):
            raise ValueError(f"special={self.special} must leave room for a patch in a frame of {self.frame} tokens")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(frame=20, special=2, mass=0.5, sparsity=0.7, tile=32, block=16),
            cls(mass=0.2, sparsity=0.8, tile=64, block=32),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"vggt_10": cls(mass=0.0, sparsity=0.9)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=False)

    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.build(global_rows, partial(self._block_number, size=self.block))

    def query_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.build(global_rows, partial(self._block_number, size=self.tile))

    def _block_number(self, position: Tensor, size: int) -> Tensor:
        """Patches have even block numbers, special tokens odd ones; some of these blocks may be empty."""
        if not self.special:
            return 2 * (position // size)
        # Patches and special tokens are counted separately through the document.
        frame, offset = position // self.frame, position % self.frame
        patch = frame * (self.frame - self.special) + offset - self.special
        special = frame * self.special + offset
        return torch.where(offset < self.special, 2 * (special // size) + 1, 2 * (patch // size))

    def selects_all_of(self, blocks: int) -> bool:
        return blocks <= 1 or self.sparsity == 0 or self.mass + MASS_MARGIN >= 1

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        return by_tile.selection_of_tiles(local_shard, self._masks(q, k, local_shard), q.shape[1])

    def _masks(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> Iterator[tuple[slice, Tensor]]:
        query_means, key_means = local_shard.query_means(q), local_shard.key_means(k)
        tile, blocks = local_shard.local_query_blocks[0], local_shard.key_blocks
        # Patches have even numbers.
        is_patch_block, is_patch_tile = ((x.number % 2 == 0).to(q.device) for x in (blocks, local_shard.query_blocks))
        for chunk, some in by_tile.tile_chunks(local_shard, q.shape[1]):
            # [tiles, blocks], of some blocks, as all below
            visible = by_tile.candidate_blocks(local_shard, chunk, some, causal=False).to(q.device)
            patches = visible & is_patch_block[some]
            # float64, as Python's own int(count * (1 - sparsity)) in the published code
            count = (patches.sum(dim=1).double() * (1 - self.sparsity)).long()
            scores = by_tile.scaled_scores(query_means[chunk], key_means[some])
            best = by_tile.best_blocks(scores, patches[None], at_least=count, mass=self.mass + MASS_MARGIN)
            # [Hq, tiles, blocks]
            yield some, visible & (best | ~is_patch_block[some] | ~is_patch_tile[tile[chunk], None])

    def choose(self, q: Tensor, k: Tensor, choice: BlockChoice) -> PackedSelection:
        query_means, _ = choice.query_means(q)
        return choice.choose(query_means, choice.key_means(k), scale=q.shape[2] ** -0.5)

    def choice(self, local_shard: LocalShard, device: torch.device) -> BlockChoice:
        blocks, tiles = local_shard.key_blocks, local_shard.query_blocks
        # Patches have even numbers.
        is_patch, is_patch_tile = blocks.number % 2 == 0, (tiles.number % 2 == 0)[local_shard.local_query_blocks[0]]
        patches = blocks.document[is_patch & (blocks.sizes > 0)].bincount(minlength=len(blocks.documents))
        return BlockChoice(
            local_shard=local_shard,
            device=device,
            queries=Queries.tiles(local_shard),
            ranking=Ranking(weights="softmax", share=self.mass + MASS_MARGIN),
            least=(patches.double() * (1 - self.sparsity)).long().clamp(min=1),
            most=longest(local_shard),
            names_own=False,
            competes=(is_patch, is_patch_tile),
        )

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        counts = self.query_blocks(global_rows).count * heads.query + self.key_blocks(global_rows).count * heads.kv
        return counts * head_dim * torch.float64.itemsize


MECHANISMS.add("vggt", VGGT)

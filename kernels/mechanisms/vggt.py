"""Block-sparse global attention for VGGT (arXiv 2509.07120, section 4): pooled softmax, special tokens whole.

A document is a row of frames; each begins with special tokens (camera, registers), the rest are patches. Patches are
pooled by tiles of queries and blocks of keys; a tile takes the blocks with the highest pooled scores, up to a share of
their softmax and at least a share of the blocks. Special tokens see and are seen by all. Reference semantics: the
published code, whose special keys stand in blocks of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms._pooled_scores import best, candidates, few_units, scaled_scores, selected
from farspan.kernels.planner import Heads

MASS_MARGIN = 1e-5
"""Added to `mass`, as in the published code, against rounding in the cumulative sum."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class VGGT(Routed):
    """frame: tokens of a frame; 0: there are no frames, all tokens are patches. special: tokens that begin each frame.

    mass: share of the softmax that is taken. sparsity: share of a document's patch blocks that may be left out, the
    rest is taken in any case. tile: queries that choose together. block: keys. Defaults: the published example's.
    """

    frame: int = 0
    special: int = 0
    mass: float = 0.97
    sparsity: float = 0.1
    tile: int = 128
    block: int = 64

    def __post_init__(self) -> None:
        if self.tile < 1 or self.block < 1:
            raise ValueError(f"tile={self.tile} and block={self.block} must be at least 1")
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
        return BlockPartition.build(global_rows, partial(self._place, size=self.block))

    def query_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.build(global_rows, partial(self._place, size=self.tile))

    def _place(self, position: Tensor, size: int) -> Tensor:
        """Patches lie in blocks of even number, special tokens in those of odd number, some of which may be empty."""
        if not self.special:
            return 2 * (position // size)
        frame, place = position // self.frame, position % self.frame
        patch = frame * (self.frame - self.special) + place - self.special
        special = frame * self.special + place
        return torch.where(place < self.special, 2 * (special // size) + 1, 2 * (patch // size))

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        return selected(local_shard, self._masks(q, k, local_shard), q.shape[1])

    def _masks(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> Iterator[Tensor]:
        query_means, key_means = local_shard.query_means(q), local_shard.key_means(k)
        tile, blocks = local_shard.local_query_blocks[0], local_shard.key_blocks
        is_patch_block, is_patch_tile = (self._is_patch(x).to(q.device) for x in (blocks, local_shard.query_blocks))
        for units in few_units(local_shard, q.shape[1]):
            seen = candidates(local_shard, units, causal=False).to(q.device)
            patches = seen & is_patch_block
            count = (patches.sum(dim=1).double() * (1 - self.sparsity)).long()
            scores = scaled_scores(query_means[units], key_means)
            taken = best(scores, patches[None], at_least=count, mass=self.mass + MASS_MARGIN)
            yield seen & (taken | ~is_patch_block | ~is_patch_tile[tile[units], None])

    @staticmethod
    def _is_patch(partition: BlockPartition) -> Tensor:
        return partition.number % 2 == 0

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        counts = self.query_blocks(global_rows).count * heads.query + self.key_blocks(global_rows).count * heads.kv
        return counts * head_dim * torch.float64.itemsize


MECHANISMS.add("vggt", VGGT)

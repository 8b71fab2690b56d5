"""SpargeAttn's choice of blocks (arXiv 2502.18137, section 3.2), for training: the first of its two filters.

A tile of queries and a block of keys stand for their rows by their means, where the rows are alike: the mean cosine of
all pairs of them exceeds a threshold. Keys have their document's mean taken off before. Of a tile's blocks those with
the highest scores are taken, up to a share of the softmax over the scores of all alike blocks, or of the blocks.
Tiles and blocks whose rows are not alike are always computed. Reference semantics: the published block map.

Made for inference, it has two traits to know before training with `causal`: means are of whole tiles and documents, so
that what is chosen, though not what is seen, depends on later tokens; and a tile longer than a block may leave out the
blocks of its own tokens, so that some see nothing: `diagonal` has them taken.
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
from farspan.kernels.mechanisms._pooled_scores import best, candidates, few_units, scaled_scores, selected
from farspan.kernels.planner import Heads


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SpargeAttention(Routed):
    """tile: queries that choose together. block: keys. Other defaults: those of the published code.

    similarity: mean cosine from which on rows are alike. mass: share of the softmax that is taken; the block that
    exceeds it is left out. top: share of a document's blocks that is taken instead, if above 0. sink: the first block
    of a document is always taken. diagonal: so are the blocks of a tile's own tokens. causal: later tokens are hidden.
    """

    tile: int = 128
    block: int = 64
    similarity: float = 0.6
    mass: float = 0.98
    top: float = 0.0
    sink: bool = False
    diagonal: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        if self.tile < 1 or self.block < 1:
            raise ValueError(f"tile={self.tile} and block={self.block} must be at least 1")
        if not (0 <= self.mass <= 1 and 0 <= self.top <= 1):
            raise ValueError(f"mass={self.mass} and top={self.top} must be from 0 to 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(tile=32, block=16, similarity=-0.1, mass=0.5),
            cls(tile=32, block=32, similarity=0.04, top=0.3, sink=True, causal=False),
            cls(tile=32, block=8, similarity=-0.1, top=0.2, diagonal=True),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"sparge_top_10": cls(similarity=-0.1, top=0.1)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=self.causal)

    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.blocks(global_rows, self.block)

    def query_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.blocks(global_rows, self.tile)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        return selected(local_shard, self._masks(q, k, local_shard), q.shape[1])

    def _masks(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> Iterator[Tensor]:
        group, tile = q.shape[1] // k.shape[1], local_shard.local_query_blocks[0]
        query_means, key_means = local_shard.query_means(q), local_shard.key_means(k)
        k = k - _document_means(key_means, local_shard)[local_shard.key_block_of_row].to(k.dtype)
        query_alike = (_similarity(q, local_shard, local_shard.query_blocks)[tile] > self.similarity).t()  # [Hq, units]
        key_alike = (
            (_similarity(k, local_shard, local_shard.key_blocks) > self.similarity).t().repeat_interleave(group, dim=0)
        )
        in_document = local_shard.key_blocks.first.diff()[local_shard.query_block_extent.document[tile]]
        for units in few_units(local_shard, q.shape[1]):
            seen = candidates(local_shard, units, causal=self.causal).to(q.device)
            alike = key_alike[:, None, :]
            scores = scaled_scores(query_means[units], key_means)
            count = (in_document[units] * self.top).long().to(q.device)
            taken = best(scores, alike & seen, at_least=count, mass=None if self.top else self.mass)
            always = ~alike | ~query_alike[:, units, None] | self._forced(local_shard, tile[units]).to(q.device)
            yield seen & (taken | always)

    def _forced(self, local_shard: LocalShard, tile: Tensor) -> Tensor:
        """Return which blocks these tiles take whatever their scores, bool `[units, blocks]`."""
        tiles, blocks = local_shard.query_block_extent, local_shard.key_block_extent
        forced = torch.zeros(len(tile), local_shard.key_blocks.count, dtype=torch.bool)
        if self.sink:
            forced[:, local_shard.key_blocks.first[:-1]] = True
        if self.diagonal:
            forced |= (blocks.last >= tiles.first[tile, None]) & (blocks.first <= tiles.last[tile, None])
        return forced

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        """Sums of rows and of rows of length one, of tiles and of blocks."""
        counts = self.query_blocks(global_rows).count * heads.query + self.key_blocks(global_rows).count * heads.kv
        return 2 * counts * head_dim * torch.float64.itemsize


def _document_means(block_means: Tensor, local_shard: LocalShard) -> Tensor:
    """Return for each block the mean over its document, float32, of the means of blocks `[blocks, Hk, D]`; then 0."""
    weight = local_shard.key_blocks.sizes.to(block_means.device).double().view(-1, 1, 1)
    document = local_shard.key_block_extent.document.to(block_means.device)
    shape = len(local_shard.key_blocks.documents), *block_means.shape[1:]
    sums = block_means.new_zeros(shape, dtype=torch.float64).index_add_(0, document, block_means.double() * weight)
    counts = weight.new_zeros(shape[0], 1, 1).index_add_(0, document, weight)
    # A last row of zeros: padding has block -1.
    return torch.cat(((sums / counts)[document].float(), block_means.new_zeros(1, *shape[1:])))


def _similarity(x: Tensor, local_shard: LocalShard, partition: BlockPartition) -> Tensor:
    """Return the mean cosine of all pairs of rows of x `[rows, heads, D]` in each block, float32 `[blocks, heads]`.

    The sum over all pairs is the square of the sum of the rows at length one.
    """
    x = x.double()
    unit_rows = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    sums = local_shard.all_reduce_sum(partition.sums(unit_rows, local_shard.rows))
    return (sums.square().sum(dim=-1) / partition.sizes.to(x.device).square()[:, None]).float()


MECHANISMS.add("sparge", SpargeAttention)

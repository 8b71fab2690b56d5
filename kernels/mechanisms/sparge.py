"""SpargeAttn's choice of blocks (arXiv 2502.18137, section 3.2), for training: the first of its two filters.

A tile of queries and a block of keys are represented by their means where their rows are self-similar: the mean cosine
of all pairs of rows exceeds a threshold. The document's mean is subtracted from keys first. A tile selects the blocks
with the highest scores, up to a share of the softmax over all self-similar blocks, or a share of the blocks. Tiles and
blocks that are not self-similar are always computed. Reference semantics: the published block map.

Made for inference, it has two traits to know before training with `causal`. Means are of full tiles and documents, so
the selection, though not the attention, depends on later tokens. A tile longer than a block may leave out the blocks of
its own tokens, so that some of them see nothing: `diagonal` selects these blocks always.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SpargeAttention(BlockChooser):
    """Tiles of queries select blocks of keys by their means; defaults are those of the published code."""

    tile: int = 128
    """Queries that share a selection."""
    block: int = 64
    """Keys per block."""
    similarity: float = 0.6
    """Mean cosine above which the rows of a tile or block count as self-similar."""
    mass: float = 0.98
    """Share of the softmax that is selected; the block that exceeds it is left out."""
    top: float = 0.0
    """Share of a document's blocks that is selected instead, if above 0."""
    sink: bool = False
    """Whether the first block of a document is always selected."""
    diagonal: bool = False
    """Whether the blocks of a tile's own tokens are always selected."""
    causal: bool = True
    """Whether later tokens are hidden."""

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

    def selects_all_of(self, blocks: int) -> bool:
        return blocks <= 1 or (self.top or self.mass) >= 1

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        return by_tile.selection_of_tiles(local_shard, self._masks(q, k, local_shard), q.shape[1])

    def _masks(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> Iterator[tuple[slice, Tensor]]:
        group, tile = q.shape[1] // k.shape[1], local_shard.local_query_blocks[0]
        query_means, key_means = local_shard.query_means(q), local_shard.key_means(k)
        k = k - _document_means(key_means, local_shard)[local_shard.key_block_of_row].to(k.dtype)
        # [tiles, Hq] -> [Hq, tiles], and [blocks, Hk] -> [Hq, 1, blocks]
        tile_similar = (_similarity(q, local_shard, local_shard.query_blocks)[tile] > self.similarity).t()
        block_similar = _similarity(k, local_shard, local_shard.key_blocks) > self.similarity
        block_similar = block_similar.t().repeat_interleave(group, dim=0)[:, None, :]
        in_document = local_shard.key_blocks.first.diff()[local_shard.query_blocks.document[tile]]
        for chunk, some in by_tile.tile_chunks(local_shard, q.shape[1]):
            # [tiles, blocks], of some blocks, as all below
            visible = by_tile.candidate_blocks(local_shard, chunk, some, causal=self.causal).to(q.device)
            scores, similar = by_tile.scaled_scores(query_means[chunk], key_means[some]), block_similar[..., some]
            count = (in_document[chunk] * self.top).long().to(q.device)
            mass = None if self.top else self.mass
            best = by_tile.best_blocks(scores, similar & visible, at_least=count, mass=mass)
            always = ~similar | ~tile_similar[:, chunk, None]
            always = always | self._forced(local_shard, tile[chunk], some).to(q.device)
            yield some, visible & (best | always)  # [Hq, tiles, blocks]

    def _forced(self, local_shard: LocalShard, tile: Tensor, blocks: slice) -> Tensor:
        """Which of `blocks` these tiles select whatever their scores, bool `[tiles, blocks]`."""
        (first_query, last_query), (first_key, last_key) = local_shard.query_block_extent, local_shard.key_block_extent
        forced = torch.zeros(len(tile), blocks.stop - blocks.start, dtype=torch.bool)
        if self.sink:
            forced |= local_shard.key_blocks.number[blocks] == 0
        if self.diagonal:
            forced |= (last_key[blocks] >= first_query[tile, None]) & (first_key[blocks] <= last_query[tile, None])
        return forced

    def choose(self, q: Tensor, k: Tensor, choice: BlockChoice) -> PackedSelection:
        query_means, tile_similar = choice.query_means(q, similarity=self.similarity)
        key_means = choice.key_means(k)
        block_similar = choice.similar_blocks(k, key_means, self.similarity)
        return choice.choose(
            query_means,
            key_means,
            scale=q.shape[2] ** -0.5,
            block_competes=block_similar,
            query_competes=tile_similar,
        )

    def choice(self, local_shard: LocalShard, device: torch.device) -> BlockChoice:
        blocks = local_shard.key_blocks.first.diff()
        return BlockChoice(
            local_shard=local_shard,
            device=device,
            queries=Queries.tiles(local_shard),
            ranking=Ranking(weights="none" if self.top else "softmax", share=self.mass, sink=self.sink),
            least=(blocks * self.top).long().clamp(min=1),
            most=longest(local_shard),
            names_own=self.diagonal,
            compares=True,
        )

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        """Sums of rows, and of rows scaled to length one, of tiles and blocks."""
        counts = self.query_blocks(global_rows).count * heads.query + self.key_blocks(global_rows).count * heads.kv
        return 2 * counts * head_dim * torch.float64.itemsize


def _document_means(block_means: Tensor, local_shard: LocalShard) -> Tensor:
    """The mean key of each block's document, float32 `[blocks + 1, Hk, D]`, of block means `[blocks, Hk, D]`."""
    weight = local_shard.key_blocks.sizes.to(block_means.device).double().view(-1, 1, 1)  # [blocks, 1, 1]
    document = local_shard.key_blocks.document.to(block_means.device)
    shape = len(local_shard.key_blocks.documents), *block_means.shape[1:]
    sums = block_means.new_zeros(shape, dtype=torch.float64).index_add_(0, document, block_means.double() * weight)
    counts = weight.new_zeros(shape[0], 1, 1).index_add_(0, document, weight)
    # A last row of zeros for padding, whose block is -1.
    return torch.cat(((sums / counts)[document].float(), block_means.new_zeros(1, *shape[1:])))


def _similarity(x: Tensor, local_shard: LocalShard, partition: BlockPartition) -> Tensor:
    """The mean cosine of all pairs of rows of x `[rows, heads, D]` in each block, float32 `[blocks, heads]`."""
    # The sum of the cosines of all pairs is the square of the sum of the rows scaled to length one.
    x = x.double()
    unit_rows = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    sums = local_shard.all_reduce_sum(partition.sums(unit_rows, local_shard.rows))
    return (sums.square().sum(dim=-1) / partition.sizes.to(x.device).square()[:, None]).float()


MECHANISMS.add("sparge", SpargeAttention)

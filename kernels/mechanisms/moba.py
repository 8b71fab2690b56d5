"""MoBA, mixture of block attention (arXiv 2502.13189, section 2): each query of each head attends to its best blocks.

Reference semantics: the published naive implementation. A document is cut into blocks of `block` tokens. A block's
score for a query is the product of the query with the mean of the block's keys, both as they enter attention. The
query's own block is always selected and counts as one of `top_k`; later blocks never are.
"""

from collections.abc import Mapping, Sequence
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
from farspan.kernels.mechanisms._block_choice import BlockChoice, BlockChooser, Queries, longest
from farspan.kernels.planner import Heads
from farspan.kernels.planning.choice_tiles import Ranking
from farspan.kernels.routing.ranking import affinity, top

SCORES_AT_ONCE = 1 << 19
"""Scores that exist at the same time: few enough for a cache."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MoBA(BlockChooser):
    """Top-k blocks for each query of each head; the defaults are those of the paper's scaling runs at 8K."""

    block: int = 512
    """Tokens per block."""
    top_k: int = 3
    """Blocks per query, its own included."""

    def __post_init__(self) -> None:
        if self.block < 1 or self.top_k < 1:
            raise ValueError(f"block={self.block} and top_k={self.top_k} must be at least 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(block=32, top_k=3),)

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"moba_512x8": cls(block=512, top_k=8), "moba_128x32": cls(block=128, top_k=32)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=True)

    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.blocks(global_rows, self.block)

    def most_selected(self, blocks: int) -> int:
        return min(self.top_k, blocks)

    def selects_all_of(self, blocks: int) -> bool:
        return blocks <= self.top_k

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        blocks, own_block = local_shard.key_blocks, local_shard.key_block_of_row
        means = local_shard.key_means(k)  # [blocks, Hk, D]
        # The first block of each row's document.
        first_block = blocks.first[blocks.document[own_block.clamp(min=0)]] if blocks.count else own_block
        selected = torch.full((q.shape[1], len(own_block), min(self.top_k, blocks.count)), -1, dtype=torch.int32)
        at_once = max(SCORES_AT_ONCE // (q.shape[1] * max(blocks.count, 1)), 1)
        for start in range(0, len(own_block), at_once):
            part = slice(start, start + at_once)
            # Only blocks that some of these queries may select are scored.
            low, stop = int(first_block[part].min()), int(own_block[part].max()) + 1
            if low < stop:
                best = self._best(q[part], means[low:stop], own_block[part] - low, first_block[part] - low)
                selected[:, part, : best.shape[2]] = torch.where(best < 0, -1, best + low).int().cpu()
        query_block = torch.arange(len(own_block)).masked_fill(own_block < 0, -1)  # every row by itself
        return BlockSelection.from_lists(query_block, blocks, selected)

    def _best(self, q: Tensor, means: Tensor, own_block: Tensor, first_block: Tensor) -> Tensor:
        """The best blocks from `first_block` to `own_block` of each query, int64 `[Hq, queries, K]`, -1 for none."""
        block = torch.arange(len(means), device=q.device)
        own_block, first_block = own_block.to(q.device)[:, None], first_block.to(q.device)[:, None]  # [queries, 1]
        scores = affinity(q, means)  # [Hq, queries, blocks]
        scores.masked_fill_((block >= own_block) | (block < first_block), float("-inf"))
        scores.masked_fill_(block == own_block, float("inf"))
        return top(scores, self.top_k)

    def choose(self, q: Tensor, k: Tensor, choice: BlockChoice) -> PackedSelection:
        return choice.choose(q, choice.key_means(k))

    def choice(self, local_shard: LocalShard, device: torch.device) -> BlockChoice:
        most = self.most_selected(longest(local_shard))
        return BlockChoice(
            local_shard=local_shard,
            device=device,
            queries=Queries.rows(local_shard),
            ranking=Ranking(own_counts=True),
            least=torch.full((len(local_shard.key_blocks.documents),), most),
            most=most,
            names_own=True,
        )

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        return self.key_blocks(global_rows).count * heads.kv * head_dim * torch.float64.itemsize

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        """Independent of the scores: earlier blocks are full, and a query selects min(top_k - 1, earlier) of them."""
        position = global_rows.position.long()
        earlier = (position // self.block).clamp(max=self.top_k - 1)
        count = position % self.block + 1 + earlier * self.block
        return count.masked_fill(global_rows.document < 0, 0).double()

    def unmasked_pairs(self, rows: Rows, *, max_queries: int | None = None) -> int:
        return int(self.keys_per_query(rows).sum())


MECHANISMS.add("moba", MoBA)

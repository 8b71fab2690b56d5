"""VMoBA, mixture of block attention for video (arXiv 2506.23858): blocks are bricks of time and space, both directions.

Reference semantics: the published code. A query's score for a block is its product with the mean of the block's keys.
Its own block is always taken and counts. Further blocks are taken by rank or until the taken scores, scaled to lie from
0 to 1, are a given share of all; each query of each head ranks its blocks, or a head ranks all pairs of a document's
queries and blocks together. The paper alternates 1-, 2- and 3-dimensional bricks from layer to layer. Pairs that tie
with the last one taken of a head's joint ranking are taken too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms._global_threshold import Pairs, cut_bytes, find_cut
from farspan.kernels.planner import Heads
from farspan.kernels.routing.ranking import affinity, from_sortable, sortable, sortable_from_zero

SCORES_AT_ONCE = 1 << 22
"""Scores that are held at the same time."""
ONE = 1 << 31
"""Scaled scores are counted in this part of 1, as sums of integers do not depend on their order."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class VMoBA(Routed):
    """frame: rows and columns of a frame of video; empty: tokens have time only. brick: size of a block in time and in
    each dimension of the frame; 0 is all of it. Bricks at an edge may be smaller.

    rule: `threshold` takes blocks up to `share` of the scores (the paper's 0.25), `top_k` takes that many, its own
    included; over a head's joint ranking, that many per query. scope: what is ranked together.
    """

    frame: tuple[int, ...] = ()
    brick: tuple[int, ...] = (512,)
    rule: Literal["threshold", "top_k"] = "threshold"
    scope: Literal["query", "head"] = "query"
    share: float = 0.25
    top_k: int = 3

    def __post_init__(self) -> None:
        if len(self.brick) != len(self.frame) + 1 or min(self.brick) < 0 or min(self.frame, default=1) < 1:
            raise ValueError(
                f"brick={list(self.brick)} must have a size for time and one for each dimension of "
                f"frame={list(self.frame)}, whose sizes are at least 1"
            )
        if not 0 < self.share <= 1 or self.top_k < 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1, and top_k={self.top_k} at least 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(frame=(4, 8), brick=(2, 4, 4), scope="head", share=0.4),
            cls(frame=(4, 8), brick=(0, 2, 8), rule="top_k", top_k=2),
            cls(brick=(32,), rule="top_k", top_k=2, scope="head"),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"vmoba_1024": cls(brick=(1024,))}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=False)

    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        return BlockPartition.build(global_rows, self._place)

    def _place(self, position: Tensor) -> Tensor:
        place, rest = torch.zeros_like(position), position
        stride = 1
        for size, brick in zip(reversed(self.frame), reversed(self.brick[1:]), strict=True):
            length = brick or size
            place += rest % size // length * stride
            rest, stride = rest // size, stride * -(-size // length)
        return place + (rest // self.brick[0] * stride if self.brick[0] else 0)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        ranking = _Ranking(self, q, local_shard.key_means(k), local_shard)
        take = ranking.of_queries if self.scope == "query" else ranking.of_heads
        unit = torch.arange(len(q)).masked_fill(local_shard.key_block_of_row < 0, -1)
        none = torch.zeros(q.shape[1], 0, local_shard.key_blocks.count, dtype=torch.bool)
        return BlockSelection.from_parts(unit, local_shard.key_blocks, [none, *take()])

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        blocks = self.key_blocks(global_rows)
        cuts = 0 if self.scope == "query" else 3 if self.rule == "threshold" else 1
        weights = cuts // 3 * 2 * heads.query * len(blocks.documents) * torch.int64.itemsize
        means = blocks.count * heads.kv * head_dim * torch.float64.itemsize
        return means + cuts * cut_bytes(heads.query, len(blocks.documents)) + weights


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some queries.

    scores: float32 `[Hq, queries, blocks]`. seen, own: which blocks are in the document of each query, and which is its
    own, bool `[queries, blocks]`. group: number of the document, int64 `[queries]`, -1 for padding.
    """

    scores: Tensor
    seen: Tensor
    own: Tensor
    group: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Ranking:
    """Masks of the blocks taken, bool `[Hq, some queries, blocks]`, in the order of the queries."""

    options: VMoBA
    q: Tensor
    means: Tensor
    local_shard: LocalShard

    def parts(self) -> Iterator[_Part]:
        blocks, device = self.local_shard.key_blocks, self.q.device
        if not blocks.count:
            return
        document = self.local_shard.key_block_extent.document.to(device)
        filled = (blocks.sizes > 0).to(device)
        for rows in torch.arange(len(self.q)).split(max(SCORES_AT_ONCE // (self.q.shape[1] * blocks.count), 1)):
            mine = self.local_shard.key_block_of_row[rows].to(device)
            scores = affinity(self.q[rows.to(device)], self.means)
            own = torch.arange(blocks.count, device=device) == mine[:, None]
            group = document[mine].masked_fill(mine < 0, -1)
            yield _Part(scores, (document == group[:, None]) & filled, own, group)

    def of_queries(self) -> Iterator[Tensor]:
        """Each query of each head by itself."""
        for part in self.parts():
            own_first = part.scores.masked_fill(~part.seen, float("-inf")).masked_fill(part.own, float("inf"))
            order = (-sortable(own_first)).sort(dim=-1, stable=True).indices
            if self.options.rule == "top_k":
                count = torch.full_like(order[..., :1], self.options.top_k)
            else:
                low = part.scores.masked_fill(~part.seen, float("inf")).amin(dim=-1, keepdim=True)
                high = part.scores.masked_fill(~part.seen, float("-inf")).amax(dim=-1, keepdim=True)
                taken = (_scaled(part.scores, low, high) * part.seen).gather(-1, order).cumsum(-1)
                need = (taken[..., -1:].double() * self.options.share).ceil().long()
                # Up to the block that reaches the share; besides the query's own at least one.
                count = (taken < need).sum(dim=-1, keepdim=True).clamp(min=1) + 1
            place = torch.arange(order.shape[-1], device=order.device)
            yield torch.zeros_like(part.scores, dtype=torch.bool).scatter_(-1, order, place < count) & part.seen

    def of_heads(self) -> Iterator[Tensor]:
        """All pairs of a head and document together."""
        cut = self._cut()
        for part in self.parts():
            keys = sortable_from_zero(part.scores)
            yield ((keys >= cut[:, part.group.clamp(min=0), None]) | part.own) & part.seen

    def _cut(self) -> Tensor:
        """Return the key from which on pairs are taken, int64 `[Hq, documents]`."""
        blocks, total, device = self.local_shard.key_blocks, self.local_shard.all_reduce_sum, self.q.device
        document = self.local_shard.key_block_extent.document.to(device)

        def per_document(of_blocks: Tensor) -> Tensor:
            sums = torch.zeros(len(blocks.documents), dtype=torch.int64, device=device)
            return sums.index_add_(0, document, of_blocks.to(device).long()).expand(self.q.shape[1], -1)

        tokens, filled = per_document(blocks.sizes), per_document(blocks.sizes > 0)
        if self.options.rule == "top_k":
            return find_cut(lambda: self._others(None), (self.options.top_k - 1) * tokens, total)
        high, low = (find_cut(self._all, need, total) for need in (torch.ones_like(tokens), tokens * filled))
        span = from_sortable(low), from_sortable(high)
        everything, own = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for part in self.parts():
            weight = _scaled(part.scores, *(x[:, part.group.clamp(min=0), None] for x in span)) * part.seen
            everything = everything.index_add(1, part.group.clamp(min=0), weight.sum(dim=-1))
            own = own.index_add(1, part.group.clamp(min=0), (weight * part.own).sum(dim=-1))
        need = (total(everything).double() * self.options.share).ceil().long() - total(own)
        return find_cut(lambda: self._others(span), need.clamp(min=1), total)

    def _all(self) -> Iterator[Pairs]:
        for part in self.parts():
            yield Pairs(part.scores, part.seen.long().expand_as(part.scores), part.group)

    def _others(self, span: tuple[Tensor, Tensor] | None) -> Iterator[Pairs]:
        """Pairs with other blocks than the query's own, weighed by their scaled scores, or as 1 each."""
        for part in self.parts():
            weight = torch.ones_like(part.scores, dtype=torch.int64)
            if span is not None:
                weight = _scaled(part.scores, *(x[:, part.group.clamp(min=0), None] for x in span))
            yield Pairs(part.scores, weight * (part.seen & ~part.own), part.group)


def _scaled(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where the scores lie between the lowest and the highest, int64 from 0 to ONE; ONE where all are equal."""
    span = (high.double() - low.double()).clamp(min=0)
    place = (scores.double() - low.double()) / span.masked_fill(span == 0, 1.0)
    return (place.masked_fill(span == 0, 1.0).clamp(0, 1) * ONE).round().long()


MECHANISMS.add("vmoba", VMoBA)

"""VMoBA, mixture of block attention for video (arXiv 2506.23858): blocks are bricks of time and space, both directions.

Reference semantics: the published code. A query's score for a block is its product with the mean of the block's keys.
Its own block is always selected and counts. Further blocks are selected by rank, or until the selected scores, scaled
to 0 to 1, are a given share of all; each query of each head ranks its blocks, or a head ranks all pairs of a document's
queries and blocks together. The paper alternates 1-, 2- and 3-dimensional bricks from layer to layer. In a head's joint
ranking, pairs that tie with the last one selected are selected too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, final

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms._block_choice import BlockChoice, BlockChooser, Queries, longest
from farspan.kernels.planner import AllReduceSum, Heads
from farspan.kernels.planning.choice_tiles import Ranking
from farspan.kernels.routing.ranking import affinity, from_sortable, sortable, sortable_from_zero

SCORES_AT_ONCE = 1 << 22
"""Scores that exist at the same time."""
ONE = 1 << 31
"""Scaled scores are integers from 0 to this: sums of integers do not depend on their order."""
MOST_PAIRS = torch.iinfo(torch.int64).max // ONE
"""Pairs whose scaled scores, added up, fit into an int64."""
DIGIT_BITS = 8
KEY_BITS = 32


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class VMoBA(BlockChooser):
    """Blocks are bricks of time and space, selected by top-k or by a share of the scores."""

    frame: tuple[int, ...] = ()
    """Rows and columns of a video frame; empty if tokens have time only."""
    brick: tuple[int, ...] = (512,)
    """Size of a block in time and in each dimension of the frame; 0 is all of it. Bricks at a border may be smaller."""
    rule: Literal["threshold", "top_k"] = "threshold"
    """Select blocks up to `share` of the scores, or `top_k` of them."""
    scope: Literal["query", "head"] = "query"
    """Rank the blocks of each query, or all pairs of a head and document together."""
    share: float = 0.25
    """Share of the scores for the rule `threshold`; the default is the paper's."""
    top_k: int = 3
    """Blocks per query, its own included, for the rule `top_k`; the mean over queries in a joint ranking."""

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
        return BlockPartition.build(global_rows, self._brick_number)

    def _brick_number(self, position: Tensor) -> Tensor:
        # Row-major over the bricks of a frame, then over time; the last dimension of the frame is the fastest.
        number, rest = torch.zeros_like(position), position
        stride = 1
        for size, brick in zip(reversed(self.frame), reversed(self.brick[1:]), strict=True):
            length = brick or size
            number += rest % size // length * stride
            rest, stride = rest // size, stride * -(-size // length)
        return number + (rest // self.brick[0] * stride if self.brick[0] else 0)

    def most_selected(self, blocks: int) -> int:
        if self.scope == "head":
            return blocks
        # The query's own block, the fewest of the others that can have less than the share, and the one that reaches
        # it: m of n others weigh at least m / n of all.
        most = int(self.share * (blocks - 1)) + 3 if self.rule == "threshold" else self.top_k
        return min(most, blocks)

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        if self.scope == "query" or self.rule == "top_k":
            return None
        pairs = longest * self.key_blocks(Rows.packed([longest])).count
        if pairs <= MOST_PAIRS:
            return None
        return (
            f"scope='head' adds up the scores of {pairs} pairs of a query and a block in a document of {longest} "
            f"tokens, more than the {MOST_PAIRS} that fit: take larger bricks, or scope='query'"
        )

    def selects_all_of(self, blocks: int) -> bool:
        return blocks <= (self.top_k if self.rule == "top_k" else 1)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        ranking = _Ranking(self, q, local_shard.key_means(k), local_shard)
        masks = ranking.per_query() if self.scope == "query" else ranking.per_head()
        query_block = torch.arange(len(q)).masked_fill(local_shard.key_block_of_row < 0, -1)  # every row by itself
        return BlockSelection.from_parts(query_block, local_shard.key_blocks, masks, heads=q.shape[1])

    def choose(self, q: Tensor, k: Tensor, choice: BlockChoice) -> PackedSelection:
        key_means = choice.key_means(k)
        if self.scope == "query":
            return choice.choose(q, key_means)
        return choice.selection(self._joint_choice(q, key_means, choice))

    def _joint_choice(self, q: Tensor, key_means: Tensor, choice: BlockChoice) -> Tensor:
        """Return the bits by a ranking of all pairs of a head and document, int32 `[T, Hq, words]`."""
        from farspan.kernels.triton_kernels.joint_choice_launch import JointRanking

        local_shard = choice.local_shard
        ranking = JointRanking(
            q=q,
            block_means=key_means,
            table=choice.joint_tiles,
            rule=choice.rule,
            documents=len(choice.least),
            all_reduce_sum=local_shard.all_reduce_sum,
        )
        # [searches, documents] -> [searches, Hq, documents]
        need = self._needs_on(q.device, local_shard)[:, None].repeat(1, q.shape[1], 1)
        if self.rule == "top_k":
            return ranking.select(ranking.threshold(need, None, own=False))
        span = ranking.threshold(need, None, own=True)
        pairs, own = ranking.weights(span)
        need = ((pairs.double() * self.share).ceil().long() - own).clamp(min=1)
        return ranking.select(ranking.threshold(need[None], span, own=False))

    def prepare(self, local_shard: LocalShard, device: torch.device) -> PackedSelection | None:
        if self.scope == "head":
            self._needs_on(device, local_shard)
        return BlockChooser.prepare(self, local_shard, device)

    def _needs_on(self, device: torch.device, local_shard: LocalShard) -> Tensor:
        return local_shard.once(("needs", device), lambda: copy_to(self._joint_needs(local_shard.key_blocks), device))

    def _joint_needs(self, blocks: BlockPartition) -> Tensor:
        """Return how many pairs of each document the first searches look for, int64 `[searches, documents]`.

        For the rule `threshold` these are the first and the last of all pairs: the highest and the lowest score.
        """
        documents = len(blocks.documents)
        tokens = torch.zeros(documents, dtype=torch.int64).index_add_(0, blocks.document, blocks.sizes)
        if self.rule == "top_k":
            return (min(self.top_k, blocks.count + 1) - 1) * tokens[None]
        filled = blocks.document[blocks.sizes > 0].bincount(minlength=documents)
        return torch.stack((torch.ones_like(tokens), tokens * filled))

    def choice(self, local_shard: LocalShard, device: torch.device) -> BlockChoice:
        by_share, joint, blocks = self.rule == "threshold", self.scope == "head", longest(local_shard)
        ranking = Ranking(weights="scaled" if by_share else "none", share=self.share, own_counts=True)
        return BlockChoice(
            local_shard=local_shard,
            device=device,
            queries=Queries.rows(local_shard),
            ranking=None if joint else ranking,
            least=torch.full((len(local_shard.key_blocks.documents),), 1 if by_share else min(self.top_k, blocks)),
            most=self.most_selected(blocks),
            names_own=True,
        )

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        blocks = self.key_blocks(global_rows)
        # The rule `threshold` needs the highest and lowest score and two sums besides the threshold itself.
        searches = 0 if self.scope == "query" else 3 if self.rule == "threshold" else 1
        weights = searches // 3 * 2 * heads.query * len(blocks.documents) * torch.int64.itemsize
        means = blocks.count * heads.kv * head_dim * torch.float64.itemsize
        return means + searches * _threshold_bytes(heads.query, len(blocks.documents)) + weights


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some queries, and the blocks `some` of their documents, which alone are scored.

    scores: float32 `[Hq, queries, blocks]`. in_document, own: the blocks of each query's document, and its own block,
    bool `[queries, blocks]`. group: number of the document, int64 `[queries]`, -1 for padding.
    """

    some: slice
    scores: Tensor
    in_document: Tensor
    own: Tensor
    group: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Ranking:
    """Masks of the selected blocks, bool `[Hq, some queries, some blocks]`, in the order of the queries."""

    options: VMoBA
    q: Tensor
    means: Tensor
    local_shard: LocalShard

    def parts(self) -> Iterator[_Part]:
        blocks, device = self.local_shard.key_blocks, self.q.device
        if not blocks.count:
            return
        document, filled = blocks.document, blocks.sizes > 0
        for rows in torch.arange(len(self.q)).split(max(SCORES_AT_ONCE // (self.q.shape[1] * blocks.count), 1)):
            own_block = self.local_shard.key_block_of_row[rows]
            group = document[own_block].masked_fill(own_block < 0, -1)
            some = blocks.span(group)
            scores = affinity(self.q[rows.to(device)], self.means[some])
            own = torch.arange(some.start, some.stop) == own_block[:, None]
            in_document = (document[some] == group[:, None]) & filled[some]
            yield _Part(some, scores, in_document.to(device), own.to(device), group.to(device))

    def per_query(self) -> Iterator[tuple[slice, Tensor]]:
        """Each query of each head ranks its blocks."""
        for part in self.parts():
            own_first = part.scores.masked_fill(~part.in_document, float("-inf")).masked_fill(part.own, float("inf"))
            order = (-sortable(own_first)).sort(dim=-1, stable=True).indices
            if self.options.rule == "top_k":
                count = torch.full_like(order[..., :1], self.options.top_k)
            else:
                low = part.scores.masked_fill(~part.in_document, float("inf")).amin(dim=-1, keepdim=True)
                high = part.scores.masked_fill(~part.in_document, float("-inf")).amax(dim=-1, keepdim=True)
                cumulative = (_scaled(part.scores, low, high) * part.in_document).gather(-1, order).cumsum(-1)
                need = (cumulative[..., -1:].double() * self.options.share).ceil().long()
                # Up to the block that reaches the share, and at least one besides the query's own.
                count = (cumulative < need).sum(dim=-1, keepdim=True).clamp(min=1) + 1
            rank = torch.arange(order.shape[-1], device=order.device)
            # From ranks back to blocks, [Hq, queries, blocks].
            best = torch.zeros_like(part.scores, dtype=torch.bool).scatter_(-1, order, rank < count)
            yield part.some, best & part.in_document

    def per_head(self) -> Iterator[tuple[slice, Tensor]]:
        """Each head ranks all pairs of a document's queries and blocks together."""
        threshold = self._threshold()
        for part in self.parts():
            keys = sortable_from_zero(part.scores)
            yield part.some, ((keys >= _of_document(threshold, part)) | part.own) & part.in_document

    def _threshold(self) -> Tensor:
        """The key from which on pairs are selected, int64 `[Hq, documents]`."""
        blocks, total, device = self.local_shard.key_blocks, self.local_shard.all_reduce_sum, self.q.device
        document = self.local_shard.key_blocks.document.to(device)

        # [blocks] -> sums [Hq, documents]
        def per_document(of_blocks: Tensor) -> Tensor:
            sums = torch.zeros(len(blocks.documents), dtype=torch.int64, device=device)
            return sums.index_add_(0, document, of_blocks.to(device).long()).expand(self.q.shape[1], -1)

        tokens = per_document(blocks.sizes)
        if self.options.rule == "top_k":
            return _find_threshold(lambda: self._weighted(None, own=False), (self.options.top_k - 1) * tokens, total)
        # Highest and lowest score: the first of all (query, block) pairs of a document, and that of negated scores.
        high = _find_threshold(lambda: self._weighted(None, own=True), torch.ones_like(tokens), total)
        low = _find_threshold(lambda: _negated(self._weighted(None, own=True)), torch.ones_like(tokens), total)
        span = -from_sortable(low), from_sortable(high)
        all_blocks, own = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for part in self.parts():
            weight = _scaled(part.scores, *(_of_document(x, part) for x in span)) * part.in_document
            all_blocks = all_blocks.index_add(1, part.group.clamp(min=0), weight.sum(dim=-1))
            own = own.index_add(1, part.group.clamp(min=0), (weight * part.own).sum(dim=-1))
        need = (total(all_blocks).double() * self.options.share).ceil().long() - total(own)
        return _find_threshold(lambda: self._weighted(span, own=False), need.clamp(min=1), total)

    def _weighted(self, span: tuple[Tensor, Tensor] | None, *, own: bool) -> Iterator[tuple[_Part, Tensor]]:
        """Weigh pairs by their scores, scaled to the span, or by 1 each; with the queries' own blocks, or without."""
        for part in self.parts():
            weight = torch.ones_like(part.scores, dtype=torch.int64)
            if span is not None:
                weight = _scaled(part.scores, *(_of_document(x, part) for x in span))
            yield part, weight * (part.in_document if own else part.in_document & ~part.own)


def _negated(weighted: Iterator[tuple[_Part, Tensor]]) -> Iterator[tuple[_Part, Tensor]]:
    return ((replace(part, scores=-part.scores), weight) for part, weight in weighted)


def _of_document(values: Tensor, part: _Part) -> Tensor:
    """The value of each query's document: `[Hq, documents]` -> `[Hq, queries, 1]`."""
    return values[:, part.group.clamp(min=0), None]


def _scaled(scores: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scores scaled between the lowest and the highest, int64 from 0 to ONE; ONE where all are equal."""
    span = (high.double() - low.double()).clamp(min=0)
    scaled = (scores.double() - low.double()) / span.masked_fill(span == 0, 1.0)
    return (scaled.masked_fill(span == 0, 1.0).clamp(0, 1) * ONE).round().long()


def _find_threshold(
    weighted: Callable[[], Iterator[tuple[_Part, Tensor]]], need: Tensor, total: AllReduceSum
) -> Tensor:
    """The greatest key such that pairs with this key or above weigh `need` or more, int64 `[Hq, documents]`.

    Radix select: each pass over the scores fixes one 8-bit digit of the threshold by a histogram, summed over ranks; no
    rank ever needs the scores of another, and no sort is needed. Keys are those of `sortable_from_zero`. need: int64
    `[Hq, documents]`. Where all pairs weigh less, the threshold is 0; where nothing is needed, it is above all keys.
    `weighted` is called once per digit and yields some queries and the weights of their pairs with all blocks, int64
    `[Hq, queries, blocks]`. Weights are integers and their sums exact, so ranks and their order make no difference.
    """
    threshold, left = torch.zeros_like(need), need
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        weights = need.new_zeros(*need.shape, 1 << DIGIT_BITS)  # histogram [Hq, documents, digits]
        for part, weight in weighted():
            keys, group = sortable_from_zero(part.scores), part.group.clamp(min=0)
            # Only keys that share the digits fixed so far compete for the next one.
            leads = keys >> (shift + DIGIT_BITS) == (threshold >> (shift + DIGIT_BITS))[:, group, None]
            digit = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            index = (group[None, :, None] << DIGIT_BITS) + digit  # [Hq, queries, blocks], in [0, documents * digits)
            counted = torch.where(leads & (part.group >= 0)[:, None], weight, 0)
            # [Hq, documents, digits] -> [Hq, documents * digits]
            weights.flatten(1).scatter_add_(1, index.flatten(1), counted.flatten(1))
        from_digit = total(weights).flip(-1).cumsum(-1).flip(-1)  # weight of this digit and all above
        digit = ((from_digit >= left.unsqueeze(-1)).sum(dim=-1) - 1).clamp(min=0)
        # The weight of greater digits is selected in any case; the rest must come from this digit.
        beyond = torch.cat((from_digit[..., 1:], torch.zeros_like(from_digit[..., :1])), dim=-1)
        left = left - beyond.gather(-1, digit.unsqueeze(-1)).squeeze(-1)
        threshold = threshold + (digit << shift)
    return threshold.masked_fill(need <= 0, 1 << KEY_BITS)


def _threshold_bytes(heads: int, documents: int) -> int:
    """Bytes that `_find_threshold` sums over ranks."""
    return KEY_BITS // DIGIT_BITS * heads * documents * (1 << DIGIT_BITS) * torch.int64.itemsize


MECHANISMS.add("vmoba", VMoBA)

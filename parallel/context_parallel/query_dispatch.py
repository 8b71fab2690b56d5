"""Query dispatch: which queries go to which ranks, because these hold keys of blocks that the queries chose.

A dispatched query is one token and query head on its way to one rank. Example: 4 blocks of 2 tokens, contiguous on 2
ranks, 1 head, top-2 routing; rank 1 holds the tokens 4 to 7 and dispatches 3 of its 4 queries:

                      chosen blocks    on rank 0 (blocks 0 1)    on rank 1 (blocks 2 3)
    rank 1, token 4       0 2              block 0  -> dispatched    block 2  -> local attention
    rank 1, token 5       1 2              block 1  -> dispatched    block 2  -> local attention
    rank 1, token 6       2 3              -                         blocks 2 3
    rank 1, token 7       0 1              blocks 0 1 -> dispatched  -

    DispatchPlan of rank 1:   row 0 1 3   head 0 0 0   num_blocks 1 1 2   block 0 | 1 | 0 1
                              queries_per_rank (3, 0)   blocks_per_rank (4, 0)

Rank 0 attends to its keys with the received queries, each a row of one head (`ReceivedQueries`), and returns out and
log-sum-exp, which rank 1 merges into its local results. Rank 0 dispatches nothing: the mask is causal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import expand, offsets_of
from farspan.parallel.context_parallel.strategy import ShardedPlanner
from farspan.parallel.layout import Shards

BEYOND = 1 << 31
"""Above every position."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchPlan:
    """The queries that one rank dispatches, those to rank 0 first, then by row and head.

    row, head: of each query, int64 `[queries]`. num_blocks: how many blocks of the other rank each chose, int64
    `[queries]`; block: these, query by query, int64 `[sum(num_blocks)]`. queries_per_rank, blocks_per_rank: how many go
    to each rank.
    """

    row: Tensor
    head: Tensor
    num_blocks: Tensor
    block: Tensor
    queries_per_rank: tuple[int, ...]
    blocks_per_rank: tuple[int, ...]

    @staticmethod
    def of(selection: BlockSelection, owners: "BlockOwners", shards: Shards, rank: int, heads: int) -> "DispatchPlan":
        """Plan what `rank` dispatches, whose rows made the selection with `heads` query heads."""
        row, head, block = _choices(selection, heads)
        position = shards.rows_of(rank).position[row].long()
        # [choices, P]: whether a rank has a key of the chosen block that the query sees.
        sees = owners.first_position[block] <= (position[:, None] if owners.causal else BEYOND - 1)
        sees[:, rank] = False
        choice, to = sees.nonzero().t()
        # One number per dispatched query that sorts by rank, row and head; its blocks end up side by side.
        tokens = shards.tokens_local
        query = (to * tokens + row[choice]) * heads + head[choice]
        order = query.argsort(stable=True)
        query, num_blocks = query[order].unique_consecutive(return_counts=True)
        return DispatchPlan(
            row=query // heads % tokens,
            head=query % heads,
            num_blocks=num_blocks,
            block=block[choice[order]],
            queries_per_rank=tuple((query // heads // tokens).bincount(minlength=shards.degree).tolist()),
            blocks_per_rank=tuple(to.bincount(minlength=shards.degree).tolist()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class BlockOwners:
    """first_position: least position of each block's rows on each rank, int64 `[blocks, P]`; BEYOND if it has none."""

    first_position: Tensor
    causal: bool

    @staticmethod
    def of(attention_mask: AttentionMask, blocks: BlockPartition, shards: Shards) -> "BlockOwners":
        first = torch.full((blocks.count, shards.degree), BEYOND)
        for rank in range(shards.degree):
            rows = shards.rows_of(rank)
            block = blocks.of(rows)
            first[:, rank].scatter_reduce_(0, block[block >= 0], rows.position[block >= 0].long(), "amin")
        return BlockOwners(first, attention_mask.causal)


def _choices(selection: BlockSelection, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, query head and block of every choice of every row, int64 `[choices]`.

    A selection has one list of blocks for each query block and selecting head; both stand for several rows and heads.
    """
    num_query_blocks = max(selection.num_query_blocks, 1)
    # Query block 0 collects the rows that choose nothing.
    query_block = selection.query_block.clamp(min=-1) + 1  # [rows]
    order = query_block.argsort(stable=True)
    num_rows = query_block.bincount(minlength=selection.num_query_blocks + 1)
    first_row = num_rows.cumsum(0) - num_rows
    of_choice, selecting_head = selection.lists % num_query_blocks + 1, selection.lists // num_query_blocks
    # Expand each choice to all rows of its query block.
    choice, nth = expand(num_rows[of_choice])  # [choices] -> [rows' choices]
    row, block = order[first_row[of_choice[choice]] + nth], selection.key_blocks.long()[choice]
    # Then to all query heads that share the selecting head.
    shared = heads // selection.heads
    head = selecting_head[choice][:, None] * shared + torch.arange(shared)  # [choices, shared]
    # [choices, shared] -> [choices * shared]
    return row.repeat_interleave(shared), head.flatten(), block.repeat_interleave(shared)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReceivedQueries:
    """Attention of received queries to the local keys, as one head: keys of each KV head are documents of their own.

    Queries are `[queries, 1, D]`, keys `[Hk * T, 1, D]`.
    """

    plan: Plan
    kv_heads: int

    @staticmethod
    def of(
        planner: ShardedPlanner, attention_mask: AttentionMask, blocks: BlockPartition, described: Tensor, block: Tensor
    ) -> "ReceivedQueries":
        """Plan for the queries of a message.

        described: token, query head and number of chosen blocks of each, int64 `[queries, 3]`; block: these blocks,
        query by query, int64 `[sum of numbers]`.
        """
        (token, head, num_blocks), kv_heads = described.t(), planner.share.local_heads.kv
        kv_head = head // (planner.share.local_heads.query // kv_heads)
        queries = _rows_of_heads(planner.global_rows.take(token), kv_head, blocks)
        local, num_keys = planner.global_rows.take(planner.tokens.repeat(kv_heads)), len(planner.tokens)
        keys = _rows_of_heads(local, torch.arange(kv_heads).repeat_interleave(num_keys), blocks)  # [Hk * T]
        # The partition once per KV head: block b of KV head h has the number h * blocks.count + b.
        first = blocks.first[:-1] + torch.arange(kv_heads)[:, None] * blocks.count  # [Hk, documents]
        partition = BlockPartition(
            documents=torch.arange(len(blocks.documents) * kv_heads, dtype=torch.int32),
            first=torch.cat((first.flatten(), blocks.first[-1:] * kv_heads)),  # [Hk * documents + 1]
            block_in_document=blocks.block_in_document,
            sizes=blocks.sizes.repeat(kv_heads),  # [Hk * blocks]
        )
        selection = BlockSelection(
            heads=1,
            query_block=torch.arange(len(token)),
            blocks=partition,
            offsets=offsets_of(num_blocks),
            # kv_head: [queries] -> [sum(num_blocks)]
            key_blocks=(block + kv_head.repeat_interleave(num_blocks) * blocks.count).int(),
        )
        plan = Plan.build(queries, keys, attention_mask, heads=1, selection=selection)
        return ReceivedQueries(plan=plan, kv_heads=kv_heads)

    def as_one_head(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1, 1, x.shape[2])  # [T, Hk, D] -> [Hk, T, D] -> [Hk * T, 1, D]

    def as_kv_heads(self, x: Tensor) -> Tensor:
        return x.view(self.kv_heads, -1, x.shape[2]).transpose(0, 1)  # [Hk * T, 1, D] -> [Hk, T, D] -> [T, Hk, D]


def _rows_of_heads(rows: Rows, head: Tensor, blocks: BlockPartition) -> Rows:
    """Return the rows with documents of their own for each head."""
    # Documents are renumbered: an id times the number of heads could overflow int32.
    number = torch.searchsorted(blocks.documents, rows.document.clamp(min=0)) + head * len(blocks.documents)
    document = torch.where(rows.document < 0, rows.document, number.int())
    return Rows(position=rows.position, document=document)

"""Shipments: which queries go to which ranks, as these hold blocks of keys that the queries chose."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import expand, offsets_of
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchPlan:
    """Queries of one rank that leave it; an item is one row and query head on its way to one rank.

    row, head: of each item, int64 `[items]`, those to rank 0 first, by row, then by head. block: int64 `[entries]`,
    what each chose of what the other rank holds, item by item; count: int64 `[items]`, how many. items, entries: to
    each rank.
    """

    row: Tensor
    head: Tensor
    count: Tensor
    block: Tensor
    items: tuple[int, ...]
    entries: tuple[int, ...]

    @staticmethod
    def of(selection: BlockSelection, holders: "BlockOwners", shards: Shards, rank: int, heads: int) -> "DispatchPlan":
        """Return what leaves `rank`, whose rows made the selection, of `heads` query heads."""
        row, head, block = _choices(selection, heads)
        position = shards.rows_of(rank).position[row].long()
        goes = holders.first_seen[block] <= (position[:, None] if holders.causal else ANYWHERE - 1)
        goes[:, rank] = False
        entry, to = goes.nonzero().t()
        # By rank, row and head, as the entries of one item have to be neighbors.
        item = (to * len(shards.index[rank]) + row[entry]) * heads + head[entry]
        order = item.argsort(stable=True)
        items, count = item[order].unique_consecutive(return_counts=True)
        degree = shards.degree
        return DispatchPlan(
            row=items // heads % len(shards.index[rank]),
            head=items % heads,
            count=count,
            block=block[entry[order]],
            items=tuple((items // heads // len(shards.index[rank])).bincount(minlength=degree).tolist()),
            entries=tuple(to.bincount(minlength=degree).tolist()),
        )


ANYWHERE = 1 << 31
"""Above every position."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockOwners:
    """first_seen: least position of each block's rows on each rank, int64 `[blocks, P]`; ANYWHERE where it has none."""

    first_seen: Tensor
    causal: bool

    @staticmethod
    def of(attention_mask: AttentionMask, blocks: BlockPartition, shards: Shards) -> "BlockOwners":
        first = torch.full((blocks.count, shards.degree), ANYWHERE)
        for rank in range(shards.degree):
            rows = shards.rows_of(rank)
            block = blocks.of(rows)
            first[:, rank].scatter_reduce_(0, block[block >= 0], rows.position[block >= 0].long(), "amin")
        return BlockOwners(first, attention_mask.causal)


def _choices(selection: BlockSelection, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, query head and block of every choice of every row, int64 `[choices]`."""
    rows_of_unit = selection.query_block.clamp(min=-1) + 1
    order = rows_of_unit.argsort(stable=True)
    sizes = rows_of_unit.bincount(minlength=selection.num_query_blocks + 1)
    first = sizes.cumsum(0) - sizes
    num_query_blocks = max(selection.num_query_blocks, 1)
    unit, chooser = selection.lists % num_query_blocks + 1, selection.lists // num_query_blocks
    repeats = sizes[unit]
    choice, nth = expand(repeats)
    row, block = order[first[unit[choice]] + nth], selection.key_blocks.long()[choice]
    shared = heads // selection.heads
    head = chooser[choice][:, None] * shared + torch.arange(shared)
    return row.repeat_interleave(shared), head.flatten(), block.repeat_interleave(shared)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReceivedQueries:
    """Attention of items that arrived to the keys held here: one head, each KV head's keys as documents of their own.

    Queries are `[items, 1, D]`, keys `[Hk x tokens_local, 1, D]`.
    """

    plan: Plan
    kv_heads: int

    @staticmethod
    def of(
        attention_mask: AttentionMask, blocks: BlockPartition, shards: Shards, rank: int, *, heads: int, kv_heads: int,
        token: Tensor, head: Tensor, count: Tensor, block: Tensor,
    ) -> "ReceivedQueries":  # fmt: skip
        """Plan for items of these tokens and query heads, that chose `count` blocks each, set end to end."""
        global_rows = shards.rows
        kv_head = head // (heads // kv_heads)
        queries = _of_heads(global_rows.take(token), kv_head, blocks)
        mine = shards.rows_of(rank)
        keys = _set_end_to_end([_of_heads(mine, torch.full((len(mine),), h), blocks) for h in range(kv_heads)])
        numbers = torch.arange(kv_heads)[:, None]
        partition = BlockPartition(
            documents=torch.arange(len(blocks.documents) * kv_heads, dtype=torch.int32),
            first=torch.cat(((blocks.first[:-1] + numbers * blocks.count).flatten(), blocks.first[-1:] * kv_heads)),
            block_in_document=blocks.block_in_document,
            sizes=blocks.sizes.repeat(kv_heads),
        )
        selection = BlockSelection(
            heads=1,
            query_block=torch.arange(len(token)),
            num_query_blocks=len(token),
            blocks=partition,
            offsets=offsets_of(count),
            key_blocks=(block + kv_head.repeat_interleave(count) * blocks.count).int(),
        )
        plan = Plan.build(queries, keys, attention_mask, heads=1, selection=selection)
        return ReceivedQueries(plan=plan, kv_heads=kv_heads)

    def keys(self, x: Tensor) -> Tensor:
        """Return `[Hk x tokens_local, 1, width]` of x `[tokens_local, Hk, width]`."""
        return x.transpose(0, 1).reshape(-1, 1, x.shape[2])

    def back(self, x: Tensor) -> Tensor:
        """Return `[tokens_local, Hk, width]` of x `[Hk x tokens_local, 1, width]`."""
        return x.view(self.kv_heads, -1, x.shape[2]).transpose(0, 1)


def _of_heads(rows: Rows, head: Tensor, blocks: BlockPartition) -> Rows:
    """Return the rows with documents of their own for each head, numbered anew: ids may be as large as int32."""
    number = torch.searchsorted(blocks.documents, rows.document.clamp(min=0)) + head * len(blocks.documents)
    document = torch.where(rows.document < 0, rows.document, number.int())
    return Rows(position=rows.position, document=document)


def _set_end_to_end(parts: Sequence[Rows]) -> Rows:
    return Rows(
        position=torch.cat([part.position for part in parts]), document=torch.cat([part.document for part in parts])
    )

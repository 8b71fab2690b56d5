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

Rank 0 attends to its keys with the received queries, each a row of one head (`LocalKeys`), and returns out and
log-sum-exp, which rank 1 merges into its local results. Rank 0 dispatches nothing: the mask is causal.

All of it is computed where the choice was made, on the device or on the CPU. There the choices are sorted as numbers
(`Choices`), as many as there may be; the host learns how many go to each rank, and then how long lists are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.isolation import Isolation
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.ragged import offsets_of, take_or
from farspan.parallel.context_parallel.strategy import ShardedPlanner
from farspan.parallel.layout import Shards

NEVER = torch.iinfo(torch.int32).max
"""Above every position."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchPlan:
    """The queries that one rank dispatches, those to rank 0 first, then by row and head.

    row, head: of each query, int64 `[queries]`. num_blocks: how many blocks of the other rank each chose, int64
    `[queries]`; block: these, query by query, ascending, int64 `[sum(num_blocks)]`. queries_per_rank, blocks_per_rank:
    how many go to each rank.
    """

    row: Tensor
    head: Tensor
    num_blocks: Tensor
    block: Tensor
    queries_per_rank: Sequence[int]
    blocks_per_rank: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choices:
    """What one rank dispatches, of a length that only the device knows.

    numbers: ((rank * T + row) * heads + head) * blocks + block of each chosen block on each rank, ascending; then as
    many above all of these as are left. is_first: whether a number is the first of its query, bool. per_rank: how many
    queries and blocks go to each rank, int64 `[P, 2]`.
    """

    numbers: Tensor
    is_first: Tensor
    per_rank: Tensor
    owners: "BlockOwners"

    def plan(self, per_rank: Sequence[Sequence[int]]) -> DispatchPlan:
        """Return the lists; per_rank: the same on the host."""
        queries, blocks = ([counts[column] for counts in per_rank] for column in range(2))
        number, heads = self.numbers[: sum(blocks)], self.owners.heads
        first = self.is_first[: sum(blocks)].nonzero_static(size=sum(queries)).squeeze(1)
        # [queries]: rank x T x heads + row x heads + head
        query = number[first] // self.owners.blocks
        return DispatchPlan(
            row=query // heads % self.owners.tokens,
            head=query % heads,
            num_blocks=torch.nn.functional.pad(first, (0, 1), value=sum(blocks)).diff(),
            block=number % self.owners.blocks,
            queries_per_rank=queries,
            blocks_per_rank=blocks,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockOwners:
    """Which ranks hold rows of a block; each rank has T = `tokens` rows.

    owner: the ranks with rows of each block, int64 `[blocks + 1, owners]`, as many columns as any block needs.
    first_position: the least position of these rows, int32; NEVER where there are fewer owners, as in the last row,
    which is that of no block. position: up to which each row sees, int32 `[P, T]`.
    """

    owner: DeviceCopies
    first_position: DeviceCopies
    position: DeviceCopies
    tokens: int
    heads: int
    blocks: int

    @staticmethod
    def of(attention_mask: AttentionMask, blocks: BlockPartition, shards: Shards, heads: int) -> "BlockOwners":
        first = torch.full((blocks.count + 1, shards.degree), NEVER, dtype=torch.int32)
        for rank in range(shards.degree):
            rows = shards.rows_of(rank)
            block = blocks.of(rows)
            first[:, rank].scatter_reduce_(0, block[block >= 0], rows.position[block >= 0], "amin")
        # Owners to the left: blocks lie on few ranks under most layouts.
        first, owner = first.sort(dim=1)
        owners = int((first < NEVER).sum(dim=1).max())
        position = shards.rows.take(shards.index.flatten()).position.view(shards.index.shape)  # [P * T] -> [P, T]
        return BlockOwners(
            owner=DeviceCopies(owner[:, :owners].contiguous()),
            first_position=DeviceCopies(first[:, :owners].contiguous()),
            position=DeviceCopies(position if attention_mask.causal else torch.full_like(position, NEVER - 1)),
            tokens=shards.tokens_local,
            heads=heads,
            blocks=max(blocks.count, 1),
        )

    def choices(self, rank: int, pair: Tensor, block: Tensor) -> Choices:
        """Sort the choices of a rank, row * heads + head and block, int64 `[choices]`; see `Backend.choices`."""
        first, owner, position = (x.on(pair.device) for x in (self.first_position, self.owner, self.position))
        # [choices, owners]: whether another rank has no key of the chosen block that the query sees.
        hidden = first.masked_fill(owner == rank, NEVER)[block] > position[rank][pair // self.heads][:, None]
        rows = self.tokens * self.heads
        number = (owner[block] * rows + pair[:, None]) * self.blocks + block[:, None]
        number = number.masked_fill_(hidden, len(position) * rows * self.blocks).flatten().sort().values
        is_first = torch.nn.functional.pad(number // self.blocks, (1, 0), value=-1).diff() != 0
        starts = torch.arange(len(position) + 1, device=number.device) * (rows * self.blocks)
        starts = torch.searchsorted(number, starts)
        queries = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))[starts].diff()
        return Choices(
            numbers=number, is_first=is_first, per_rank=torch.stack((queries, starts.diff()), dim=1), owners=self
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _BlocksOfHeads(BlockPartition):
    """Blocks of keys of several KV heads, head after head. key_block: of each key, int64 `[Hk * T]`; -1: none."""

    key_block: Tensor

    def of(self, rows: Rows) -> Tensor:
        assert len(rows) == len(self.key_block)
        return self.key_block


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LocalKeys:
    """The keys of one rank as those of one head, `[Hk * T, 1, D]`, for queries of other ranks, `[queries, 1, D]`.

    plan: of all tokens of the sequence, from which `received` draws. block: the number of each block among those with
    local rows, int64 `[blocks]`. blocks: these for every KV head: block b of head h is h * (their number) + b.
    """

    plan: Plan
    block: DeviceCopies
    blocks: BlockPartition
    kv_heads: int
    heads_per_kv_head: int

    @staticmethod
    def of(planner: ShardedPlanner, attention_mask: AttentionMask, blocks: BlockPartition) -> "LocalKeys":
        heads = planner.share.local_heads
        block_of_row = blocks.of(planner.local_rows)  # [T]
        present = block_of_row[block_of_row >= 0].unique()
        number = torch.full((blocks.count,), -1)
        number[present] = torch.arange(len(present))
        first = torch.arange(heads.kv)[:, None] * len(present)  # [Hk, 1]
        # [Hk, T] -> [Hk * T]
        key_block = (take_or(number, block_of_row, -1) + first).masked_fill(block_of_row < 0, -1).flatten()
        of_heads = _BlocksOfHeads(
            documents=blocks.documents,
            first=torch.tensor([0, heads.kv * len(present)]),
            block_in_document=blocks.block_in_document,
            sizes=blocks.sizes[present].repeat(heads.kv),
            key_block=key_block,
        )
        queries, keys = planner.global_rows, planner.global_rows.take(planner.tokens.repeat(heads.kv))
        plan = Plan(
            queries=queries,
            keys=keys,
            attention_mask=attention_mask,
            heads=1,
            # Regions of what is drawn would depend on the choice.
            parts=tuple(HeadPlan((0,), uniform, ()) for uniform in attention_mask.by_heads(1)),
            selection=None,
            isolation=Isolation.of(queries, keys, causal=attention_mask.causal),
        )
        return LocalKeys(
            plan=plan,
            block=DeviceCopies(number),
            blocks=of_heads,
            kv_heads=heads.kv,
            heads_per_kv_head=heads.query // heads.kv,
        )

    def prepare(self, spec: InputSpec, *, backend: str) -> None:
        """Make what `received`, and attention by what it returns, need of a sequence whose inputs are `spec`."""
        self.block.on(spec.device)
        self.plan.queries_on(spec.device)
        if self.plan.isolation is not None:
            self.plan.isolation.to(spec.device)
        if self.blocks.count:
            # What is made for no query at all serves any.
            none = torch.zeros(0, 3, dtype=torch.int64)
            BACKENDS.get(backend).prepare(self.received(none, none[:, 0]), replace(spec, kv_heads=1))

    def received(self, described: Tensor, block: Tensor) -> Plan:
        """Plan for the queries of a message.

        described: token, query head and number of chosen blocks of each, int64 `[queries, 3]`; block: these blocks,
        query by query, int64 `[sum of numbers]`.
        """
        token, head, num_blocks = described.unbind(dim=1)
        first = head // self.heads_per_kv_head * (self.blocks.count // self.kv_heads)
        # [queries] -> [sum of numbers]
        first = first.repeat_interleave(num_blocks, output_size=len(block))
        selection = BlockSelection(
            heads=1,
            query_block=torch.arange(len(token), device=token.device),
            blocks=self.blocks,
            offsets=offsets_of(num_blocks),
            key_blocks=(first + self.block.on(block.device)[block]).int(),
        )
        return self.plan.draw(token, selection)

    def as_one_head(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1, 1, x.shape[2])  # [T, Hk, D] -> [Hk, T, D] -> [Hk * T, 1, D]

    def as_kv_heads(self, x: Tensor) -> Tensor:
        return x.view(self.kv_heads, -1, x.shape[2]).transpose(0, 1)  # [Hk * T, 1, D] -> [Hk, T, D] -> [T, Hk, D]

"""Block-sparse selections: which blocks of keys each block of queries attends to, in CSR form.

Three query blocks and four key blocks of one head, where block 0 selects {0}, 1 selects {0, 1} and 2 selects {0, 3}:

    offsets    [0, 1, 3, 5]
    key_blocks [0, 0, 1, 0, 3]
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.ragged import expand, offsets_of, take_or

SUMMED_AT_ONCE = 1 << 20
"""Elements whose float64 copies exist at the same time: 8 MiB."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPartition:
    """Blocks of the rows of one full sequence, numbered from 0 document by document.

    Blocks are a function of position, so any subset of the rows, in any order, finds its blocks without the others.
    documents: ids, ascending, int32 `[documents]`. first: each document's first block, then the number of blocks, int64
    `[documents + 1]`. block_in_document: of each position, int32 `[longest document]`. sizes: rows per block, int64
    `[blocks]`; may be 0.
    """

    documents: Tensor
    first: Tensor
    block_in_document: Tensor
    sizes: Tensor

    @staticmethod
    def build(global_rows: Rows, number: Callable[[Tensor], Tensor]) -> "BlockPartition":
        """Partition a full sequence; `number` maps int64 positions to block numbers inside their document."""
        real = global_rows.document >= 0
        documents, document = global_rows.document[real].unique(return_inverse=True)
        positions = global_rows.position[real].long()
        table = number(torch.arange(int(positions.max()) + 1 if len(positions) else 0)).int()
        last = torch.full((len(documents),), -1, dtype=torch.int64)
        last.scatter_reduce_(0, document, table[positions].long(), "amax")
        first = offsets_of(last + 1)
        sizes = (first[document] + table[positions]).bincount(minlength=int(first[-1]))
        return BlockPartition(documents=documents, first=first, block_in_document=table, sizes=sizes)

    @staticmethod
    def blocks(global_rows: Rows, size: int) -> "BlockPartition":
        """Partition each document into blocks of `size` consecutive positions; the last one may be shorter."""
        return BlockPartition.build(global_rows, lambda position: position // size)

    @property
    def count(self) -> int:
        return int(self.first[-1])

    @cached_property
    def document(self) -> Tensor:
        """The index in `documents` of each block's document, int64 `[blocks]`."""
        return expand(self.first.diff())[0]

    @cached_property
    def number(self) -> Tensor:
        """The number of each block in its document, int64 `[blocks]`."""
        return expand(self.first.diff())[1]

    def of(self, rows: Rows) -> Tensor:
        """The block of each row, int64 `[rows]`; -1 for padding."""
        if not len(self.documents):
            return torch.full((len(rows),), -1, dtype=torch.int64)
        document = torch.searchsorted(self.documents, rows.document.clamp(min=0)).clamp(max=len(self.documents) - 1)
        number = self.block_in_document[rows.position.clamp(max=len(self.block_in_document) - 1).long()]
        return (self.first[document] + number).masked_fill(rows.document < 0, -1)

    def span(self, document: Tensor) -> slice:
        """Return the blocks from the first to the last of these documents, indices in `documents`, -1 for padding.

        Of thousands of short documents these are few. Where all is padding, it is the first block.
        """
        real = document[document >= 0]
        return slice(int(self.first[real.min()]), int(self.first[real.max() + 1])) if len(real) else slice(0, 1)

    def extent(self, global_rows: Rows) -> tuple[Tensor, Tensor]:
        """The least and the greatest position in each block, int64 `[blocks]`; least > greatest in empty ones."""
        block = self.of(global_rows)
        block, position = block[block >= 0], global_rows.position[block >= 0].long()
        least = torch.full((self.count,), 1 << 31).scatter_reduce_(0, block, position, "amin")
        return least, torch.full((self.count,), -1).scatter_reduce_(0, block, position, "amax")

    def sums(self, x: Tensor, rows: Rows) -> Tensor:
        """Sum `x` `[rows, ...]` over the rows of each block: float64 `[blocks, ...]`.

        float64 makes the result, once rounded to float32, independent of the order of rows and ranks.
        """
        block = self.of(rows)
        # Padding goes to an extra block at the end, which is dropped.
        block = block.masked_fill(block < 0, self.count).to(x.device)
        total = torch.zeros(self.count + 1, *x.shape[1:], dtype=torch.float64, device=x.device)
        at_once = max(SUMMED_AT_ONCE // max(x[:1].numel(), 1), 1)
        for numbers, part in zip(block.split(at_once), x.split(at_once), strict=True):
            total.index_add_(0, numbers, part.double())
        return total[:-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSelection:
    """Key blocks selected by each (head group, query block): a list of block ids each, set end to end (CSR).

    heads: groups of query heads with lists of their own: every query head, or one per KV head.
    query_block: query block of each query row, int64 `[queries]`; -1 for rows that attend to nothing. A query block is
    a single row or a tile of rows; Q is their number.
    blocks: the partition of keys that block ids refer to.
    offsets: int64 `[heads * Q + 1]`. key_blocks: int32 block ids, ascending in each list. List h * Q + b is that of
    head group h and query block b.
    """

    heads: int
    query_block: Tensor
    blocks: BlockPartition
    offsets: Tensor
    key_blocks: Tensor

    @staticmethod
    def from_parts(
        query_block: Tensor, blocks: BlockPartition, masks: Iterable[tuple[slice, Tensor]], *, heads: int
    ) -> "BlockSelection":
        """Select where masks are True: bool `[heads, some query blocks, some blocks]` each, consecutive query blocks.

        Masks come a few query blocks at a time, each with the slice of the blocks that it is of, so the mask of the
        full sequence never exists.
        """
        counts, selected = [torch.zeros(heads, 0, dtype=torch.int64)], [torch.zeros(0, 2, dtype=torch.int32)]
        for some, mask in masks:
            counts.append(mask.sum(dim=2).cpu())
            found = mask.nonzero().int().cpu()[:, [0, 2]]  # [entries, (head, key block)]
            found[:, 1] += some.start
            selected.append(found)
        entries = torch.cat(selected)
        # Sorted by (part, head, query block) so far; lists are sorted by (head, query block).
        key_blocks = entries[entries[:, 0].argsort(stable=True), 1]
        offsets = offsets_of(torch.cat(counts, dim=1))  # counts [heads, Q]
        return BlockSelection(
            heads=heads, query_block=query_block, blocks=blocks, offsets=offsets, key_blocks=key_blocks
        )

    @staticmethod
    def from_lists(query_block: Tensor, blocks: BlockPartition, key_blocks: Tensor) -> "BlockSelection":
        """Select `key_blocks`, int `[heads, Q, K]`, each at most once per list; -1 fills shorter lists."""
        absent = torch.iinfo(torch.int32).max  # sorts behind every block
        key_blocks = key_blocks.int().masked_fill(key_blocks < 0, absent).sort(dim=2).values
        present = key_blocks != absent
        offsets, selected = offsets_of(present.sum(dim=2)), key_blocks.masked_select(present)
        return BlockSelection(
            heads=len(key_blocks), query_block=query_block, blocks=blocks, offsets=offsets, key_blocks=selected
        )

    @property
    def num_query_blocks(self) -> int:
        return (len(self.offsets) - 1) // self.heads

    def of_queries(self, index: Tensor) -> "BlockSelection":
        """The selection of the queries at `index`, int64 `[queries]`; an index of -1 attends to nothing."""
        return replace(self, query_block=take_or(self.query_block, index, -1))

    @property
    def as_lists(self) -> "BlockSelection":
        """Itself; a `PackedSelection` unpacks its bits for those who need lists."""
        return self

    @cached_property
    def lists(self) -> Tensor:
        """The list of each entry of `key_blocks`: h * Q + b, int64."""
        return expand(self.offsets.diff(), len(self.key_blocks))[0]

    def choices(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return each choice of each row of `heads` query heads: row * heads + head, and the block, int64 `[choices]`.

        A list is that of a query block and a head group; both stand for several rows and heads.
        """
        num_query_blocks = max(self.num_query_blocks, 1)
        # Query block 0 collects the rows that choose nothing.
        query_block = self.query_block.clamp(min=-1) + 1  # [rows]
        order = query_block.argsort(stable=True)
        num_rows = query_block.bincount(minlength=self.num_query_blocks + 1)
        first_row = num_rows.cumsum(0) - num_rows
        of_choice = self.lists % num_query_blocks + 1
        # Expand each choice to all rows of its query block: [entries] -> [rows' choices]
        choice, nth = expand(num_rows[of_choice])
        row, group = order[first_row[of_choice[choice]] + nth], (self.lists // num_query_blocks)[choice]
        # Then to all query heads of its head group.
        shared = heads // self.heads
        pair = (row * heads + group * shared)[:, None] + torch.arange(shared)  # [rows' choices, shared]
        # [rows' choices, shared] -> [choices]
        return pair.flatten(), self.key_blocks.long()[choice].repeat_interleave(shared)

    def selected_blocks(self) -> Tensor:
        """Whether any query selects a key block, bool `[heads, blocks + 1]`; False for the last, -1."""
        # Query blocks with a query, then the entries of their lists.
        active = torch.zeros(self.heads, self.num_query_blocks, dtype=torch.bool)
        active[:, self.query_block[self.query_block >= 0]] = True
        entry = active.flatten()[self.lists]  # [heads, query blocks] -> [entries]
        blocks = torch.zeros(self.heads, self.blocks.count + 1, dtype=torch.bool)
        blocks[self.lists[entry] // max(self.num_query_blocks, 1), self.key_blocks[entry].long()] = True
        return blocks

    def table(self) -> Tensor:
        """Whether a query block selects a key block, bool `[heads, Q + 1, blocks + 1]`; False for the last, -1."""
        table = torch.zeros(self.heads * self.num_query_blocks, self.blocks.count + 1, dtype=torch.bool)
        table[self.lists, self.key_blocks.long()] = True
        # [heads * Q, blocks + 1] -> [heads, Q, blocks + 1] -> [heads, Q + 1, blocks + 1]
        table = table.view(self.heads, self.num_query_blocks, self.blocks.count + 1)
        return torch.cat((table, table.new_zeros(self.heads, 1, self.blocks.count + 1)), dim=1)

    def mask(self, keys: Rows) -> Tensor:
        """Whether each query selects the block of each key, bool `[heads, queries, keys]`; quadratic."""
        return self.table()[:, self.query_block][:, :, self.blocks.of(keys)]

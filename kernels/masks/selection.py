"""Selection: which blocks of keys each query attends to, decided once from globally agreed summaries."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows

SUMMED_AT_ONCE = 1 << 20
"""Elements that are held in float64 at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockPartition:
    """Blocks of the rows of one whole sequence, numbered from 0 document by document.

    A block is known by position: any subset of the sequence's rows, in any order, finds its blocks by itself.
    documents: ids, ascending, int32 `[documents]`. first: first block of each and the number of all, int64
    `[documents + 1]`. place: block inside the document of each position, int32 `[longest document]`. sizes: rows of
    each block, int64 `[blocks]`; some may have none.
    """

    documents: Tensor
    first: Tensor
    place: Tensor
    sizes: Tensor

    @staticmethod
    def build(global_rows: Rows, place: Callable[[Tensor], Tensor]) -> "BlockPartition":
        """Partition the rows of a whole sequence; `place` gives the block in its document of int64 positions."""
        real = global_rows.document >= 0
        documents, where = global_rows.document[real].unique(return_inverse=True)
        positions = global_rows.position[real].long()
        table = place(torch.arange(int(positions.max()) + 1 if len(positions) else 0)).int()
        last = torch.full((len(documents),), -1, dtype=torch.int64)
        last.scatter_reduce_(0, where, table[positions].long(), "amax")
        first = torch.cat((torch.zeros(1, dtype=torch.int64), (last + 1).cumsum(0)))
        sizes = (first[where] + table[positions]).bincount(minlength=int(first[-1]))
        return BlockPartition(documents=documents, first=first, place=table, sizes=sizes)

    @staticmethod
    def blocks(global_rows: Rows, size: int) -> "BlockPartition":
        """Partition each document into blocks of `size` consecutive positions; the last one may be shorter."""
        return BlockPartition.build(global_rows, lambda position: position // size)

    @property
    def count(self) -> int:
        return int(self.first[-1])

    @property
    def number(self) -> Tensor:
        """The number of each block in its document, int64 `[blocks]`."""
        return torch.arange(self.count) - self.first[:-1].repeat_interleave(self.first.diff())

    def of(self, rows: Rows) -> Tensor:
        """Return the block of each row, int64 `[rows]`; -1 for padding."""
        if not len(self.documents):
            return torch.full((len(rows),), -1, dtype=torch.int64)
        real = rows.document >= 0
        document = torch.searchsorted(self.documents, rows.document.clamp(min=0)).clamp(max=len(self.documents) - 1)
        block = self.first[document] + self.place[rows.position.clamp(max=len(self.place) - 1).long()]
        return block.masked_fill(~real, -1)

    def sums(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the sum of `x` `[rows, ...]` over the rows of each block, float64 `[blocks, ...]`.

        float64, so that the order of rows and ranks does not matter once the result is rounded to float32.
        """
        block = self.of(rows)
        # Padding is added to a block of its own, which is dropped.
        block = block.masked_fill(block < 0, self.count).to(x.device)
        total = torch.zeros(self.count + 1, *x.shape[1:], dtype=torch.float64, device=x.device)
        at_once = max(SUMMED_AT_ONCE // max(x[:1].numel(), 1), 1)
        for numbers, part in zip(block.split(at_once), x.split(at_once), strict=True):
            total.index_add_(0, numbers, part.double())
        return total[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class BlockExtent:
    """Of each block of a partition: its document's number, its least and greatest position; int64 `[blocks]`.

    A block without rows has its least position above its greatest.
    """

    document: Tensor
    first: Tensor
    last: Tensor

    @staticmethod
    def of(partition: BlockPartition, global_rows: Rows) -> "BlockExtent":
        block = partition.of(global_rows)
        real = block >= 0
        block, position = block[real], global_rows.position[real].long()
        last = torch.full((partition.count,), -1).scatter_reduce_(0, block, position, "amax")
        first = torch.full((partition.count,), 1 << 31).scatter_reduce_(0, block, position, "amin")
        document = torch.arange(len(partition.documents)).repeat_interleave(partition.first.diff())
        return BlockExtent(document, first, last)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSelection:
    """For each query head and each unit of query rows (a row, or a tile of them) the key blocks that it attends to.

    heads: how many choose: all query heads, or groups of as many neighbors that share a KV head. unit: of each query
    row, int64 `[queries]`; -1 for rows that attend to nothing. blocks: what the ids mean. offsets: int64
    `[heads * units + 1]`, chosen: int32 block ids, ascending in each list (CSR); the list of head h and unit u is
    number h * units + u.
    """

    heads: int
    unit: Tensor
    num_units: int
    blocks: BlockPartition
    offsets: Tensor
    chosen: Tensor

    @staticmethod
    def from_parts(unit: Tensor, blocks: BlockPartition, masks: Iterable[Tensor]) -> "BlockSelection":
        """Select where the masks, set end to end, are True: bool `[heads, some of the units, blocks]` each.

        Units are few at a time, so that no mask of all of them is held.
        """
        counts, chosen = [], []
        for mask in masks:
            counts.append(mask.sum(dim=2).cpu())
            chosen.append(mask.nonzero().int().cpu()[:, [0, 2]])
        count = torch.cat(counts, dim=1)
        entries = torch.cat(chosen)
        # Entries are sorted by part, head and unit; lists by head and unit.
        order = entries[:, 0].argsort(stable=True)
        return BlockSelection(
            heads=count.shape[0],
            unit=unit,
            num_units=count.shape[1],
            blocks=blocks,
            offsets=_offsets(count),
            chosen=entries[order, 1],
        )

    @staticmethod
    def from_ragged(
        unit: Tensor, blocks: BlockPartition, counts: Sequence[Tensor], chosen: Sequence[Tensor], *, heads: int
    ) -> "BlockSelection":
        """Select `chosen`, int32 set end to end: lists of as many blocks as `counts` say, head by head."""
        count = torch.cat((torch.zeros(0, dtype=torch.int64), *counts)).view(heads, -1)
        return BlockSelection(
            heads=heads,
            unit=unit,
            num_units=count.shape[1],
            blocks=blocks,
            offsets=_offsets(count),
            chosen=torch.cat((torch.zeros(0, dtype=torch.int32), *chosen)),
        )

    @staticmethod
    def from_lists(unit: Tensor, blocks: BlockPartition, chosen: Tensor) -> "BlockSelection":
        """Select the blocks `chosen`, int `[heads, units, K]`, each at most once; -1 fills up shorter lists."""
        heads, num_units, _ = chosen.shape
        chosen = chosen.int().masked_fill(chosen < 0, torch.iinfo(torch.int32).max).sort(dim=2).values
        present = chosen != torch.iinfo(torch.int32).max
        return BlockSelection(
            heads=heads,
            unit=unit,
            num_units=num_units,
            blocks=blocks,
            offsets=_offsets(present.sum(dim=2)),
            chosen=chosen.masked_select(present),
        )

    def of_queries(self, index: Tensor) -> "BlockSelection":
        """Return what the queries at `index`, int64 `[queries]`, chose; an index of -1 attends to nothing."""
        # -1 is the last element of a column with one more.
        return replace(self, unit=torch.cat((self.unit, self.unit.new_full((1,), -1)))[index])

    @cached_property
    def lists(self) -> Tensor:
        """The list of each entry of `chosen`: h * units + u, int64."""
        return torch.arange(self.heads * self.num_units).repeat_interleave(self.offsets.diff())

    def table(self) -> Tensor:
        """Return whether each unit chose each block, bool `[heads, units + 1, blocks + 1]`; no for the last, -1."""
        table = torch.zeros(self.heads * self.num_units, self.blocks.count + 1, dtype=torch.bool)
        table[self.lists, self.chosen.long()] = True
        table = table.view(self.heads, self.num_units, self.blocks.count + 1)
        return torch.cat((table, table.new_zeros(self.heads, 1, self.blocks.count + 1)), dim=1)

    def mask(self, keys: Rows) -> Tensor:
        """Return whether each query chose the block of each key, bool `[heads, queries, keys]`; quadratic."""
        return self.table()[:, self.unit][:, :, self.blocks.of(keys)]


def _offsets(counts: Tensor) -> Tensor:
    """Return where each list starts and the last one stops, of their lengths `[heads, units]`."""
    return torch.cat((counts.new_zeros(1), counts.flatten().cumsum(0)))

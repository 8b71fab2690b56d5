"""A block selection as bits, of a size known ahead, so that the host need not wait for the device that selects.

Query block 0 of head 0 selects the blocks 0, 1 and 33 of 40. Of its two words, block b is bit b % 32 of word b // 32.

    bits[0, 0]    0b11, 0b10
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.ragged import take_or

WORD = 32
"""Bits of a word."""
QUERY_BLOCKS_AT_ONCE = 1 << 12
"""Query blocks whose bits are spread out at the same time."""


def num_words(blocks: int) -> int:
    """Return how many words hold a bit for each of `blocks` blocks; at least one, so that there is one to load."""
    return max(-(-blocks // WORD), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSelection:
    """Key blocks selected by each (query block, head group), one bit each; unpacked, it is a `BlockSelection`.

    bits: int32 `[Q, heads, words]`, where the queries are; bits of no block are 0. query_block: of each query row,
    int64 `[queries]`, on the CPU; -1 for rows that attend to nothing. blocks: the partition of keys. most: no list has
    more blocks than this, which the host knows.
    """

    bits: Tensor
    query_block: Tensor
    blocks: BlockPartition
    most: int

    @staticmethod
    def pack(selection: BlockSelection, device: torch.device) -> "PackedSelection":
        """Pack lists, which are on the CPU and stay at hand there."""
        count, words = selection.num_query_blocks, num_words(selection.blocks.count)
        head, query_block = selection.lists // max(count, 1), selection.lists % max(count, 1)
        block = selection.key_blocks.long()
        # Each bit occurs once, so that a sum sets it; 1 << 31 wraps around to the sign of int32.
        bits = torch.zeros(count * selection.heads * words, dtype=torch.int32)
        index = (query_block * selection.heads + head) * words + block // WORD
        bits.index_add_(0, index, (1 << (block % WORD)).int())
        packed = PackedSelection(
            bits=copy_to(bits.view(count, selection.heads, words), device),
            query_block=selection.query_block,
            blocks=selection.blocks,
            most=int(selection.offsets.diff().max()) if count else 0,
        )
        vars(packed)["as_lists"] = selection
        return packed

    @cached_property
    def as_lists(self) -> BlockSelection:
        """The same as lists on the CPU; waits for the device, unless it was packed from them."""
        count, nth = self.blocks.count, torch.arange(WORD, dtype=torch.int32)
        # [some Q, heads, words] -> [some Q, heads, words, 32] -> [heads, some Q, blocks]
        masks = (
            (slice(0, count), ((some[..., None] >> nth) & 1).bool().flatten(2)[..., :count].transpose(0, 1))
            for some in self.bits.cpu().split(QUERY_BLOCKS_AT_ONCE)
            if len(some)
        )
        return BlockSelection.from_parts(self.query_block, self.blocks, masks, heads=self.heads)

    def selected_blocks(self) -> Tensor:
        """Whether any query selects a key block, bool `[heads, blocks + 1]` on the CPU; False for the last, -1.

        Waits for the device, which sends a bit for each block and head.
        """
        active = torch.zeros(max(self.num_query_blocks, 1), dtype=torch.bool)
        active[self.query_block[self.query_block >= 0]] = True
        # As many query blocks as a power of 2, so that halves have the same size: [Q, heads, words] -> [heads, words]
        size = 1 << (len(active) - 1).bit_length()
        some = self.bits.new_zeros(size, *self.bits.shape[1:])
        some[: self.num_query_blocks] = self.bits
        if not bool(active.all()):
            some[: len(active)].mul_(copy_to(active, some.device)[:, None, None])
        while len(some) > 1:
            some = some[: len(some) // 2] | some[len(some) // 2 :]
        # [heads, words] -> [heads, words, 32] -> [heads, words * 32]
        selected = ((some[0].cpu()[..., None] >> torch.arange(WORD, dtype=torch.int32)) & 1).bool().flatten(1)
        return torch.nn.functional.pad(selected[:, : self.blocks.count], (0, 1))

    @property
    def heads(self) -> int:
        return self.bits.shape[1]

    @property
    def num_query_blocks(self) -> int:
        return self.bits.shape[0]

    def of_queries(self, index: Tensor) -> "PackedSelection":
        """The selection of the queries at `index`, int64 `[queries]`; an index of -1 attends to nothing."""
        return replace(self, query_block=take_or(self.query_block, index, -1))

    def mask(self, keys: Rows) -> Tensor:
        """Whether each query selects the block of each key, bool `[heads, queries, keys]`; quadratic."""
        return self.as_lists.mask(keys)

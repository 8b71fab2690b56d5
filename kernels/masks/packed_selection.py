"""A block selection as bits, of a size known ahead, so that the host need not wait for the device that selects.

Query block 0 of head 0 selects the blocks 0, 1 and 33 of 40. Of its two words, block b is bit b % 32 of word b // 32.

    bits[0, 0]    0b11, 0b10

Where few of many blocks are selected, their numbers take less memory until the backward pass: 32 of 8,192 blocks are
64 bytes, not 1,024, for each row and head. They are kept instead, and bits are made of them for a moment.

    numbers[0, 0]    0, 1, 33, -1        of at most 4 blocks
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection

WORD = 32
"""Bits of a word."""
NUMBERS_SAVE = 4
"""How many times as many bytes bits must have for numbers to be kept: it takes some operations to turn them back."""
QUERY_BLOCKS_AT_ONCE = 1 << 12
"""Query blocks whose bits are spread out at the same time."""


def num_words(blocks: int) -> int:
    """Return how many words hold a bit for each of `blocks` blocks; at least one, so that there is one to load."""
    return max(-(-blocks // WORD), 1)


def number_dtype(blocks: int) -> torch.dtype:
    """Return the dtype of the numbers of `blocks` blocks."""
    return torch.int16 if blocks - 1 <= torch.iinfo(torch.int16).max else torch.int32


def numbers_pay(blocks: int, most: int) -> bool:
    """Return whether the numbers of `most` blocks take much less memory than the bits of all `blocks`."""
    return NUMBERS_SAVE * most * number_dtype(blocks).itemsize <= num_words(blocks) * torch.int32.itemsize


def list_bytes(blocks: int, most: int) -> int:
    """Return the bytes of a list of at most `most` of all `blocks`: as numbers, if they pay, or as bits."""
    if numbers_pay(blocks, most):
        return most * number_dtype(blocks).itemsize
    return num_words(blocks) * torch.int32.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSelection:
    """Key blocks selected by each (query block, head group), one bit each; unpacked, it is a `BlockSelection`.

    stored: where the queries are, bits, int32 `[Q, heads, words]`, those of no block 0; or, if `numbered`, numbers of
    blocks, int16 or int32 `[Q, heads, most]`, -1 for none. query_block: of each query row, int64 `[queries]`, on the
    CPU; -1 for rows that attend to nothing. blocks: the partition of keys. most: no list has more blocks than this,
    which the host knows.
    """

    stored: Tensor
    query_block: Tensor
    blocks: BlockPartition
    most: int
    numbered: bool = False

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
            stored=copy_to(bits.view(count, selection.heads, words), device),
            query_block=selection.query_block,
            blocks=selection.blocks,
            most=int(selection.offsets.diff().max()) if count else 0,
        )
        vars(packed)["as_lists"] = selection
        return packed

    @property
    def bits(self) -> Tensor:
        """int32 `[Q, heads, words]`; made anew of numbers each time, without waiting."""
        if not self.numbered:
            return self.stored
        bits = self.stored.new_zeros(*self.stored.shape[:2], num_words(self.blocks.count), dtype=torch.int32)
        # Each bit occurs once, so that a sum sets it; -1 adds nothing.
        bit = (self.stored >= 0).int().bitwise_left_shift_(self.stored & (WORD - 1))
        return bits.scatter_add_(2, (self.stored // WORD).clamp_(min=0).long(), bit)

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
        """Whether any query selects a key block, bool `[heads, blocks + 1]` on the device; False for the last, -1."""
        active = torch.zeros(max(self.num_query_blocks, 1), dtype=torch.bool)
        active[self.query_block[self.query_block >= 0]] = True
        # As many query blocks as a power of 2, so that halves have the same size: [Q, heads, words] -> [heads, words]
        size, bits = 1 << (len(active) - 1).bit_length(), self.bits
        some = bits.new_zeros(size, *bits.shape[1:])
        some[: self.num_query_blocks] = bits
        if not bool(active.all()):
            some[: len(active)].mul_(copy_to(active, some.device)[:, None, None])
        while len(some) > 1:
            some = some[: len(some) // 2] | some[len(some) // 2 :]
        # [heads, words] -> [heads, words, 32] -> [heads, words * 32]
        nth = torch.arange(WORD, dtype=torch.int32, device=some.device)
        selected = ((some[0, ..., None] >> nth) & 1).bool().flatten(1)
        return torch.nn.functional.pad(selected[:, : self.blocks.count], (0, 1))

    @property
    def heads(self) -> int:
        return self.stored.shape[1]

    @property
    def num_query_blocks(self) -> int:
        return self.stored.shape[0]

    def mask(self, keys: Rows) -> Tensor:
        """Whether each query selects the block of each key, bool `[heads, queries, keys]`; quadratic."""
        return self.as_lists.mask(keys)

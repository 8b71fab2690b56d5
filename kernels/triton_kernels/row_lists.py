# pyright: reportMissingImports=false
"""Kernels that order the rows that select key blocks: lists of the query rows of any heads that select each block.

One KV head, whose two query heads share its keys, 4 rows in two chunks of 2, and 3 blocks. A row of a head is numbered
row * heads + head; `selects` says which blocks each selects:

    row of a head   0    1    2    3  |  4    5    6    7
    selects         0    0    0,1  1  |  0,2  2    1    2

    histogram, by block and chunk    3 1   2 1   0 3
    starts, its sum so far           0 3   4 6   7 7 10      the list of block 0 is members[0:4], chunk 0's part [0:3]
    members, block after block       0 1 2 4   2 3 6   4 5 7

A program counts, and later fills, 32 lists of one chunk: the bits of one word. It goes through its rows in order, so
that each list ascends: the same bits every time.
"""

import triton
import triton.language as tl

from farspan.kernels.masks import packed_selection

WORD = tl.constexpr(packed_selection.WORD)
VARYING = ("num_rows", "num_blocks", "num_words", "num_chunks", "chunk_rows")
"""Arguments that differ from sequence to sequence: kernels are not compiled anew for some of their values."""


@triton.jit
def _program(num_words, num_chunks):
    """Return (word, chunk, KV head) of this program."""
    i_program = tl.program_id(0)
    # Words that lie side by side in memory are read at the same time.
    return i_program % num_words, i_program // num_words % num_chunks, i_program // num_words // num_chunks


@triton.jit
def _lists(i_word, i_chunk, i_kv_head, num_blocks, num_chunks, KV_HEADS: tl.constexpr):
    """Return (where the counts of this program's 32 lists are, int64 `[32]`; which of them exist)."""
    o_block = i_word * WORD + tl.arange(0, WORD)
    o_list = o_block.to(tl.int64) * KV_HEADS + i_kv_head
    return o_list * num_chunks + i_chunk, o_block < num_blocks


@triton.jit
def _selected(
    bits, query_block, o_first, i_word, i_chunk, i_kv_head, num_rows, num_words, chunk_rows,
    HEADS: tl.constexpr, SHARE: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (number of each of the next rows of heads, int32 `[BLOCK]`; whether it selects, 0 or 1, `[32, BLOCK]`)."""
    o_nth = o_first + tl.arange(0, BLOCK)
    o_row, o_head = i_chunk * chunk_rows + o_nth // SHARE, i_kv_head * SHARE + o_nth % SHARE
    m_row = (o_nth < chunk_rows * SHARE) & (o_row < num_rows)
    o_query_block = tl.load(query_block + o_row, mask=m_row, other=-1)
    o_list = o_query_block.to(tl.int64) * LISTS + o_head // (HEADS // LISTS)
    b_word = tl.load(bits + o_list * num_words + i_word, mask=o_query_block >= 0, other=0)
    # Lanes run along the rows, as the lists do.
    return o_row * HEADS + o_head, b_word[None, :] >> tl.arange(0, WORD)[:, None] & 1


@triton.jit(do_not_specialize=VARYING)
def histogram_kernel(
    bits, query_block, counts, num_rows, num_blocks, num_words, num_chunks, chunk_rows,
    HEADS: tl.constexpr, SHARE: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write how many rows of heads of each chunk select each block, int32 `[blocks, KV heads, chunks]`.

    bits: int32 `[Q, LISTS, words]`. query_block: int32 `[rows]`, -1 for none.
    """
    i_word, i_chunk, i_kv_head = _program(num_words, num_chunks)
    b_count = tl.zeros([WORD], tl.int32)
    for o_first in range(0, chunk_rows * SHARE, BLOCK):
        _, b_selects = _selected(
            bits, query_block, o_first, i_word, i_chunk, i_kv_head, num_rows, num_words, chunk_rows,
            HEADS, SHARE, LISTS, BLOCK,
        )  # fmt: skip
        b_count += tl.sum(b_selects, 1)
    o_count, m_block = _lists(i_word, i_chunk, i_kv_head, num_blocks, num_chunks, HEADS // SHARE)
    tl.store(counts + o_count, b_count, mask=m_block)


@triton.jit(do_not_specialize=VARYING)
def fill_kernel(
    bits, query_block, starts, members, num_rows, num_blocks, num_words, num_chunks, chunk_rows,
    HEADS: tl.constexpr, SHARE: tl.constexpr, LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the rows of heads on each list, int32; starts: int64 `[blocks, KV heads, chunks]`."""
    i_word, i_chunk, i_kv_head = _program(num_words, num_chunks)
    o_count, m_block = _lists(i_word, i_chunk, i_kv_head, num_blocks, num_chunks, HEADS // SHARE)
    o_next = tl.load(starts + o_count, mask=m_block, other=0)
    for o_first in range(0, chunk_rows * SHARE, BLOCK):
        o_pair, b_selects = _selected(
            bits, query_block, o_first, i_word, i_chunk, i_kv_head, num_rows, num_words, chunk_rows,
            HEADS, SHARE, LISTS, BLOCK,
        )  # fmt: skip
        # [32, BLOCK]: as many places on as the list has got rows of this tile so far.
        o_place = o_next[:, None] + (tl.cumsum(b_selects, 1) - b_selects)
        # Bits of blocks that do not exist are 0.
        tl.store(members + o_place, o_pair[None, :] + tl.zeros_like(b_selects), mask=b_selects != 0)
        o_next += tl.sum(b_selects, 1)

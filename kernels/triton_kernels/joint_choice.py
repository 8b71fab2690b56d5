# pyright: reportMissingImports=false
"""Kernels that rank all pairs of a document's queries and blocks of keys together, for each head.

Radix select: each pass over the scores, which are made anew, adds the weights of pairs to a histogram of one digit of
their keys, and the digit at which these reach what is needed is the threshold's. Weights are integers: atomic sums are
the same in any order. Keys are the integers that sort as scores do, from 0 to 2^32 - 1.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels.block_choice import (
    INT_MAX,
    TILE_HEADER,
    block_scores,
    scaled_scores,
    score_of,
    sortable,
    store_bits,
)

DIGIT_BITS = tl.constexpr(8)
DIGITS = tl.constexpr(1 << 8)
ABOVE_ALL = tl.constexpr(1 << 32)
ZERO = tl.constexpr(1 << 31)
"""The key of a score of 0."""


@triton.jit
def _tile(tiles, scores, ROWS: tl.constexpr):
    """Return (head, document, first block, end of the blocks, queries `[ROWS]`, which exist) of this program."""
    i_tile, i_head = tl.program_id(0) // scores.heads, tl.program_id(0) % scores.heads
    p_tile = tiles + tl.cast(i_tile, tl.int64) * (TILE_HEADER + ROWS)
    o_query = tl.load(p_tile + TILE_HEADER + tl.arange(0, ROWS))
    m_query = o_query >= 0
    return i_head, tl.load(p_tile + 3), tl.load(p_tile), tl.load(p_tile + 1), tl.where(m_query, o_query, 0), m_query


@triton.jit
def _pairs(scores, rule, tile, i_block, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Return (scores, keys, which pairs exist, which are of a query and its own block), each `[BLOCKS, ROWS]`."""
    i_head, _, first, stop, o_query, m_query = tile
    o_block = i_block + tl.arange(0, BLOCKS)
    b_scores = block_scores(scores, o_query, o_block, i_head, BLOCKS, ROWS)
    b_first = tl.load(rule.key_first + o_block, mask=(o_block >= first) & (o_block < stop), other=INT_MAX)
    b_limit = tl.load(rule.limit + o_query, mask=m_query, other=-1)
    m_pair = b_first[:, None] <= b_limit[None, :]
    m_own = o_block[:, None] == tl.load(rule.own_first + o_query, mask=m_query, other=-1)[None, :]
    return b_scores, sortable(b_scores).to(tl.int64) + ZERO, m_pair, m_pair & m_own


@triton.jit
def _score_of(b_key):
    """Return the float32 score of an int64 key."""
    return score_of((b_key - ZERO).to(tl.int32))


@triton.jit
def _weights(b_scores, span, i_group, num_groups):
    """Return the scores scaled to the span of their document: highest and lowest keys, int64 `[2, groups]`."""
    high, low = tl.load(span + i_group), tl.load(span + num_groups + i_group)
    return scaled_scores(b_scores, _score_of(low), _score_of(high))


@triton.jit
def histogram_kernel(
    histogram, scores, tiles, rule, threshold, span, num_documents, shift,
    SEARCHES: tl.constexpr, OWN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the weights of pairs to the digits at `shift` of their keys, int64 `[SEARCHES, heads, documents, DIGITS]`.

    Only keys whose digits above are those of the threshold, int64 `[SEARCHES, heads, documents]`, take part, and with
    OWN queries' own blocks. span: see `_weights`; None weighs each pair by 1.
    """
    tile = _tile(tiles, scores, ROWS)
    i_head, i_document, first, stop = tile[0], tile[1], tile[2], tile[3]
    num_groups = scores.heads * num_documents
    i_group = i_head * num_documents + i_document
    for i_block in range(first // 32 * 32, stop, BLOCKS):
        b_scores, b_key, m_pair, m_own = _pairs(scores, rule, tile, i_block, BLOCKS, ROWS)
        b_weight = tl.full([BLOCKS, ROWS], 1, tl.int64)
        if span is not None:
            b_weight = _weights(b_scores, span, i_group, num_groups)
        if not OWN:
            m_pair &= m_own == 0
        for i_search in tl.static_range(SEARCHES):
            i_list = i_search * num_groups + i_group
            m_leads = (b_key >> (shift + DIGIT_BITS)) == (tl.load(threshold + i_list) >> (shift + DIGIT_BITS))
            p_digit = histogram + tl.cast(i_list, tl.int64) * DIGITS + ((b_key >> shift) & (DIGITS - 1))
            tl.atomic_add(p_digit, b_weight, mask=m_pair & m_leads, sem="relaxed")


@triton.jit
def digit_kernel(threshold, left, total, histogram, shift):
    """Fix the digit at `shift` of a threshold: the greatest such that pairs from there on weigh what is left or more.

    threshold, left: int64 `[lists]`. total, histogram: of all owners and of this one, int64 `[lists, DIGITS]`; this
    one's is cleared for the next pass. Pairs of greater digits are selected in any case; the rest of what is left must
    come from this digit. Where nothing is left from the start, the threshold is above all keys.
    """
    i_list = tl.program_id(0)
    o_digit = tl.arange(0, DIGITS)
    o_total = tl.cast(i_list, tl.int64) * DIGITS + o_digit
    b_weight = tl.load(total + o_total)
    tl.store(histogram + o_total, tl.zeros_like(b_weight))
    # The weight of each digit and of all above.
    b_from = tl.cumsum(b_weight, axis=0, reverse=True)
    need = tl.load(left + i_list)
    digit = tl.maximum(tl.sum((b_from >= need).to(tl.int32), axis=0) - 1, 0)
    found = tl.load(threshold + i_list) + (digit.to(tl.int64) << shift)
    tl.store(threshold + i_list, tl.where(need > 0, found, ABOVE_ALL))
    tl.store(left + i_list, need - tl.sum(tl.where(o_digit == digit + 1, b_from, 0), axis=0))


@triton.jit
def weight_kernel(
    total, scores, tiles, rule, span, num_documents, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add the weights of all pairs, and of queries' own blocks, to int64 `[2, heads, documents]`."""
    tile = _tile(tiles, scores, ROWS)
    i_head, i_document, first, stop = tile[0], tile[1], tile[2], tile[3]
    num_groups = scores.heads * num_documents
    i_group = i_head * num_documents + i_document
    b_all, b_own = tl.zeros([ROWS], tl.int64), tl.zeros([ROWS], tl.int64)
    for i_block in range(first // 32 * 32, stop, BLOCKS):
        b_scores, _b_key, m_pair, m_own = _pairs(scores, rule, tile, i_block, BLOCKS, ROWS)
        b_weight = _weights(b_scores, span, i_group, num_groups)
        b_all += tl.sum(tl.where(m_pair, b_weight, 0), axis=0)
        b_own += tl.sum(tl.where(m_own, b_weight, 0), axis=0)
    tl.atomic_add(total + i_group, tl.sum(b_all, axis=0), sem="relaxed")
    tl.atomic_add(total + num_groups + i_group, tl.sum(b_own, axis=0), sem="relaxed")


@triton.jit
def select_kernel(
    bits, scores, tiles, rule, threshold, num_documents, num_words, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write the bits of pairs from the threshold on, and of queries' own blocks."""
    tile = _tile(tiles, scores, ROWS)
    i_head, i_document, first, stop, o_query, m_query = tile
    least = tl.load(threshold + i_head * num_documents + i_document)
    for i_block in range(first // 32 * 32, stop, BLOCKS):
        _b_scores, b_key, m_pair, m_own = _pairs(scores, rule, tile, i_block, BLOCKS, ROWS)
        m_selected = m_own | (m_pair & (b_key >= least))
        store_bits(bits, m_selected, o_query, m_query, i_block, i_head, scores.heads, num_words, BLOCKS, ROWS)

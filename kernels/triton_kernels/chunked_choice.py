# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
"""The kernel that chooses among any number of blocks: as block_choice.py does, in chunks of blocks.

The integers that sort as the scores do are in memory that each program has for itself, and takes for one tile after
another. Passes over the chunks then find the least integer that is still chosen, two bits at a time, and those that are
chosen. Where only the number counts, a chunk's own best are written again, one after another, and only they can be
among the best of all. 2 of 6 blocks for one query, in chunks of 3:

    integers    5 9 2 | 7 1 7       best of each chunk  5 9 | 7 7     the 2nd best is 7: all above, and its first tie

The same integers, weights and ties as for all blocks at once: a document's choices do not depend on the chunks.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels.block_choice import (
    HIGHEST,
    INT_MIN,
    besides,
    best,
    block_scores,
    extremes,
    load_tile,
    permitted,
    ranked,
    score_of,
    share_of,
    sortable,
    store_bits,
    store_numbers,
    weights_of,
)

DIGIT_BITS = tl.constexpr(2)
DIGITS_OF_KEY = tl.constexpr(16)


@triton.jit
def _places(p_keys, o_place, ROWS: tl.constexpr):
    """Return where the integers at these places of each query are; lanes lie along queries."""
    return p_keys + o_place * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def _chunk(
    p_keys, o_first, b_count, weighing, WEIGHTS: tl.constexpr, OWN_COUNTS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return the integers of a chunk, INT_MIN where a block is not ranked, and their weights, `[BLOCKS, ROWS]`.

    b_count: how many integers each query has, int32 `[ROWS]`. weighing: the block of the first one, the tile's rule,
    queries, and which exist; the lowest and the highest score of each query.
    """
    o_nth = o_first + tl.arange(0, BLOCKS)
    m_nth = o_nth[:, None] < b_count[None, :]
    b_key = tl.load(_places(p_keys, o_nth[:, None], ROWS), mask=m_nth, other=INT_MIN)
    base, rule, o_query, m_query, b_low, b_high = weighing
    m_ranked = b_key > INT_MIN
    b_bits = b_key
    if OWN_COUNTS:
        b_own = tl.load(rule.own_first + o_query, mask=m_query, other=-1)
        m_own = base + o_nth[:, None] == b_own[None, :]
        m_ranked |= m_own
        b_key = tl.where(m_own, HIGHEST, b_key)
    b_weight = m_ranked.to(tl.int32)
    if WEIGHTS != "none":
        # INT_MIN is no score.
        b_scores = tl.where(m_ranked, score_of(b_bits), 0.0)
        b_weight = weights_of(b_scores, b_low, b_high, m_ranked, WEIGHTS)
    return b_key, b_weight


@triton.jit
def _least(
    p_keys, b_count, b_need, weighing, WEIGHTS: tl.constexpr, OWN_COUNTS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return the greatest integer such that those from there on weigh `b_need` or more, INT_MIN if all weigh less."""
    b_least = tl.full([ROWS], INT_MIN, tl.int32)
    num_nth = tl.max(b_count, axis=0)
    for i_digit in range(DIGITS_OF_KEY):
        b_step = tl.full([ROWS], 1, tl.int32) << (32 - DIGIT_BITS - DIGIT_BITS * i_digit)
        # Beyond 2^31 sums wrap around, from INT_MIN on.
        b_try_1 = b_least + b_step
        b_try_2 = b_try_1 + b_step
        b_try_3 = b_try_2 + b_step
        b_sum_1, b_sum_2, b_sum_3 = tl.zeros_like(b_need), tl.zeros_like(b_need), tl.zeros_like(b_need)
        for o_first in range(0, num_nth, BLOCKS):
            b_key, b_weight = _chunk(p_keys, o_first, b_count, weighing, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS)
            b_sum_1 += tl.sum(tl.where(b_key >= b_try_1[None, :], b_weight, 0), axis=0)
            b_sum_2 += tl.sum(tl.where(b_key >= b_try_2[None, :], b_weight, 0), axis=0)
            b_sum_3 += tl.sum(tl.where(b_key >= b_try_3[None, :], b_weight, 0), axis=0)
        b_least = tl.where(b_sum_1 >= b_need, b_try_1, b_least)
        b_least = tl.where(b_sum_2 >= b_need, b_try_2, b_least)
        b_least = tl.where(b_sum_3 >= b_need, b_try_3, b_least)
    return b_least


@triton.jit
def _nth_best(
    p_keys, b_count, b_number, weighing, OWN_COUNTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return the integer of the last of the `b_number` best, INT_MIN if there are fewer; how many have just this one.

    Both int32 `[ROWS]`; of the latter, as many as belong to the best.
    """
    b_least = _least(p_keys, b_count, b_number, weighing, "none", OWN_COUNTS, BLOCKS, ROWS)
    b_left = b_number
    for o_first in range(0, tl.max(b_count, axis=0), BLOCKS):
        b_key, _ = _chunk(p_keys, o_first, b_count, weighing, "none", OWN_COUNTS, BLOCKS, ROWS)
        b_left -= tl.sum((b_key > b_least[None, :]).to(tl.int32), axis=0)
    return b_least, b_left


@triton.jit
def _number_within(
    p_keys, b_count, b_limit, weighing, WEIGHTS: tl.constexpr, OWN_COUNTS: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return how many of the best weigh `b_limit` or less together, int32 `[ROWS]`; see `block_choice`."""
    b_beyond = _least(p_keys, b_count, b_limit + 1, weighing, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS)
    b_above, b_left, b_one = tl.zeros([ROWS], tl.int32), b_limit, tl.zeros_like(b_limit)
    for o_first in range(0, tl.max(b_count, axis=0), BLOCKS):
        b_key, b_weight = _chunk(p_keys, o_first, b_count, weighing, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS)
        m_above = b_key > b_beyond[None, :]
        b_above += tl.sum(m_above.to(tl.int32), axis=0)
        b_left -= tl.sum(tl.where(m_above, b_weight, 0), axis=0)
        b_one = tl.maximum(b_one, tl.max(tl.where(b_key == b_beyond[None, :], b_weight, 0), axis=0))
    return b_above + (b_left // tl.maximum(b_one, 1)).to(tl.int32) * (b_one > 0).to(tl.int32)


@triton.jit
def _score(
    p_keys, p_best, scores, rule, tile, i_head, b_number,
    WEIGHTS: tl.constexpr, OWN_COUNTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the integers of all blocks; without weights, also the `b_number` best of each chunk, with queries' own.

    Return how many of the latter each query has; the lowest and the highest score that is ranked.
    """
    first, stop, o_query, m_query = tile
    b_kept = tl.zeros([ROWS], tl.int32)
    b_low, b_high = tl.full([ROWS], float("inf"), tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    base = first // 32 * 32
    for i_block in range(base, stop, BLOCKS):
        o_block = i_block + tl.arange(0, BLOCKS)
        m_block = (o_block >= first) & (o_block < stop)
        b_scores = block_scores(scores, o_query, o_block, i_head, BLOCKS, ROWS)
        m_visible, m_own = permitted(rule, o_query, m_query, o_block, m_block)
        m_ranked = ranked(b_scores, scores, rule, o_block, m_block, m_visible, m_own, i_head, OWN_COUNTS)
        b_key = tl.where(m_ranked, sortable(b_scores), INT_MIN)
        tl.store(_places(p_keys, (o_block - base)[:, None], ROWS), b_key)
        if WEIGHTS == "none":
            if OWN_COUNTS:
                b_key = tl.where(m_own, HIGHEST, b_key)
            m_best = best(b_key, b_number, ROWS)
            b_place = b_kept[None, :] + tl.cumsum(m_best.to(tl.int32), axis=0) - 1
            tl.store(_places(p_best, b_place, ROWS), b_key, mask=m_best)
            b_kept += tl.sum(m_best.to(tl.int32), axis=0)
        else:
            b_chunk_low, b_chunk_high = extremes(b_scores, m_ranked)
            b_low, b_high = tl.minimum(b_low, b_chunk_low), tl.maximum(b_high, b_chunk_high)
    return b_kept, b_low, b_high


@triton.jit
def _write(
    chosen, p_keys, scores, rule, tile, i_head, b_least, b_left, num_queries, width,
    OWN_COUNTS: tl.constexpr, SINK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """Write the blocks above `b_least`, of the first `b_left` ties with it, and of those chosen besides."""
    first, stop, o_query, m_query = tile
    base, b_place = first // 32 * 32, tl.zeros([ROWS], tl.int32)
    for i_block in range(base, stop, BLOCKS):
        o_block = i_block + tl.arange(0, BLOCKS)
        m_block = (o_block >= first) & (o_block < stop)
        m_visible, m_own = permitted(rule, o_query, m_query, o_block, m_block)
        b_key = tl.load(_places(p_keys, (o_block - base)[:, None], ROWS))
        if OWN_COUNTS:
            b_key = tl.where(m_own, HIGHEST, b_key)
        m_tie = (b_key == b_least[None, :]) & (b_key > INT_MIN)
        b_tie = m_tie.to(tl.int32)
        m_selected = (b_key > b_least[None, :]) | (m_tie & (tl.cumsum(b_tie, axis=0) <= b_left[None, :]))
        b_left -= tl.sum(b_tie, axis=0)
        m_selected |= besides(
            scores, rule, num_queries, o_query, m_query, o_block, m_block, m_visible, m_own, first, i_head,
            OWN_COUNTS, SINK,
        )  # fmt: skip
        if NUMBERED:
            b_place = store_numbers(chosen, m_selected, b_place, o_query, m_query, o_block, i_head, scores.heads, width)
        else:
            store_bits(chosen, m_selected, o_query, m_query, i_block, i_head, scores.heads, width, BLOCKS, ROWS)


@triton.jit(do_not_specialize=("num_tiles",))
def choose_chunked_kernel(
    chosen, keys, scores, tiles, rule, num_tiles, num_queries, width, most, size, num_best,
    WEIGHTS: tl.constexpr, SHARE: tl.constexpr, OWN_COUNTS: tl.constexpr, SINK: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """Choose as `choose_kernel` does, for tiles of at most `size` blocks from a multiple of 32 on.

    keys: int32 `[programs, size + num_best, ROWS]`, undefined. num_best: what the best of all chunks take, 0 with
    weights. A program takes tiles of a head, and then of the next one, whose means others read at the same time.
    """
    p_keys = keys + tl.cast(tl.program_id(0), tl.int64) * (size + num_best) * ROWS
    p_best = p_keys + tl.cast(size, tl.int64) * ROWS
    for i_nth in range(tl.program_id(0), num_tiles * scores.heads, tl.num_programs(0)):
        i_head = i_nth // num_tiles
        first, stop, least, o_query, m_query = load_tile(tiles, i_nth % num_tiles, ROWS)
        tile = first, stop, o_query, m_query
        b_number = tl.full([ROWS], 0, tl.int32) + tl.minimum(least, most)
        # Other threads may still read what they need of the last tile; then, what others have written of this one.
        tl.debug_barrier()
        b_kept, b_low, b_high = _score(
            p_keys, p_best, scores, rule, tile, i_head, b_number, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS
        )
        tl.debug_barrier()
        base = first // 32 * 32
        weighing = base, rule, o_query, m_query, b_low, b_high
        b_count = tl.full([ROWS], 0, tl.int32) + (stop - base)
        if WEIGHTS == "none":
            b_least, b_left = _nth_best(p_best, b_kept, b_number, weighing, False, BLOCKS, ROWS)
        else:
            b_total = tl.zeros([ROWS], tl.int64)
            for o_first in range(0, stop - base, BLOCKS):
                _, b_weight = _chunk(p_keys, o_first, b_count, weighing, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS)
                b_total += tl.sum(b_weight, axis=0)
            b_limit = share_of(b_total, WEIGHTS, SHARE, ROWS)
            b_within = _number_within(p_keys, b_count, b_limit, weighing, WEIGHTS, OWN_COUNTS, BLOCKS, ROWS)
            b_number = tl.maximum(tl.full([ROWS], 0, tl.int32) + least, b_within)
            if WEIGHTS == "scaled":
                b_number += 1
            b_number = tl.minimum(b_number, most)
            b_least, b_left = _nth_best(p_keys, b_count, b_number, weighing, OWN_COUNTS, BLOCKS, ROWS)
        _write(
            chosen, p_keys, scores, rule, tile, i_head, b_least, b_left, num_queries, width,
            OWN_COUNTS, SINK, BLOCKS, ROWS, NUMBERED,
        )  # fmt: skip

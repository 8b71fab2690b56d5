# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
"""The kernel that chooses blocks of keys: scores of queries for the means of blocks, and the best of these as bits.

A tile is some queries of one document, for which all blocks of that document are scored at once, in registers, or in
parts where there are too many (chunked_choice.py):

    scores [blocks, queries]  ->  integers that sort alike  ->  the least integer that is still chosen  ->  bits

Nothing is sorted. The least integer of a query is found bit by bit, from the highest: a bit is set if the scores from
there on are still enough, in number or in weight. Numbers and weights are integers, so that their sums are the same in
any order, and scores are products and sums in float64, rounded once: choices have the same bits on every device.

Blocks are the first dimension, so that threads lie along queries, each with many blocks: one element of a query serves
as many products, and a mean is read by all lanes of a warp at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.planning.choice_tiles import HEADER

INT_MAX = tl.constexpr((1 << 31) - 1)
INT_MIN = tl.constexpr(-(1 << 31))
HIGHEST = tl.constexpr(0x7F800000)
"""The integer of +inf."""
NEVER = tl.constexpr(-1 - 0x7F800000)
"""The integer of -inf."""
SOFTMAX_ONE = tl.constexpr(1 << 40)
SCALED_ONE = tl.constexpr(1 << 31)
"""Weights are integers, this much for the highest score: of a softmax, and of scores scaled between 0 and 1."""
TILE_HEADER = tl.constexpr(HEADER)


class Strided(NamedTuple):
    """A tensor `[rows, heads, width]` with any strides."""

    pointer: Tensor
    row_stride: int
    head_stride: int
    column_stride: int

    @staticmethod
    def of(x: Tensor) -> "Strided":
        return Strided(x, *x.stride())


class Rule(NamedTuple):
    """Which blocks a query may choose, which of these compete, and which are chosen besides.

    key_first: each block's first position, int32 `[blocks]`, INT_MAX if empty. A query may choose blocks that begin at
    `limit`, int32 `[queries]`, or before. own_first, own_last: blocks of the query itself, int32 `[queries]`, None for
    no such rule. competes: of blocks, int8 `[KV heads, blocks]`; of queries, int8 `[heads, queries]`; where 0, a block
    is chosen by all, a query chooses all; None for no such rule.
    """

    key_first: Tensor
    limit: Tensor
    own_first: Tensor | None = None
    own_last: Tensor | None = None
    block_competes: Tensor | None = None
    query_competes: Tensor | None = None


class Scores(NamedTuple):
    """What scores are made of; means: float64 `[kv_heads, width, blocks]`. constexpr: heads, kv_heads."""

    q: Strided
    means: Tensor
    num_blocks: int
    width: int
    scale: float
    heads: Any
    kv_heads: Any


@triton.jit
def block_scores(scores, o_query, o_block, i_head, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Return the scores of queries for blocks, float32 `[BLOCKS, ROWS]`; 0 and -0 are the same."""
    q = scores.q
    p_q = q.pointer + o_query.to(tl.int64) * q.row_stride + tl.cast(i_head, tl.int64) * q.head_stride
    i_kv_head = i_head // (scores.heads // scores.kv_heads)
    # No load has a mask: what is not there is read from a place that is, and nobody uses its score.
    o_mean = tl.minimum(o_block, scores.num_blocks - 1)
    p_mean = scores.means + tl.cast(i_kv_head, tl.int64) * scores.width * scores.num_blocks + o_mean
    b_acc = tl.zeros([BLOCKS, ROWS], tl.float64)
    b_q, b_mean = tl.load(p_q), tl.load(p_mean)
    for i_column in range(1, scores.width + 1):
        # Loaded one step ahead, since a step takes about as long as a load; at the last one, the same again.
        step = (i_column < scores.width).to(tl.int32)
        p_q += step * q.column_stride
        p_mean += step * scores.num_blocks
        b_next_q, b_next_mean = tl.load(p_q), tl.load(p_mean)
        b_acc += b_mean[:, None] * b_q.to(tl.float32).to(tl.float64)[None, :]
        b_q, b_mean = b_next_q, b_next_mean
    b_scores = b_acc.to(tl.float32) * scores.scale
    return tl.where(b_scores == 0, 0.0, b_scores)


@triton.jit
def sortable(b_scores):
    """Return int32 that sort as float32 scores do; -inf is NEVER."""
    # A float's bits, read as an integer, sort like the float once the lower 31 of negative numbers are inverted.
    b_bits = b_scores.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & INT_MAX)


@triton.jit
def score_of(b_key):
    """Return the float32 scores of int32 made by `sortable`."""
    return (b_key ^ ((b_key >> 31) & INT_MAX)).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(b_x):
    """Return float64 from 0 to 2^51 as int64, rounded to the nearest, ties to even."""
    # 2^52 leaves no bits behind the point.
    return ((b_x + 4503599627370496.0) - 4503599627370496.0).to(tl.int64)


@triton.jit
def _softmax_weights(b_scores, b_high, m_ranked):
    """Return the weights of a softmax down each column, int64; b_high: its highest score."""
    b_top = tl.where(b_high == float("-inf"), 0.0, b_high)
    b_distance = b_scores.to(tl.float64) - b_top.to(tl.float64)[None, :]
    b_weight = tl.exp(tl.where(m_ranked, b_distance, 0.0)) * SOFTMAX_ONE
    return _rounded(b_weight)


@triton.jit
def scaled_scores(b_scores, b_low, b_high):
    """Return scores scaled between the lowest and the highest, int64; SCALED_ONE where all are equal."""
    b_low = b_low.to(tl.float64)
    b_span = b_high.to(tl.float64) - b_low
    b_scaled = (b_scores.to(tl.float64) - b_low) / tl.where(b_span > 0, b_span, 1.0)
    b_scaled = tl.minimum(tl.maximum(tl.where(b_span > 0, b_scaled, 1.0), 0.0), 1.0)
    return _rounded(b_scaled * SCALED_ONE)


@triton.jit
def extremes(b_scores, m_ranked):
    """Return the lowest and the highest of the ranked scores down each column."""
    b_low = tl.min(tl.where(m_ranked, b_scores, float("inf")), axis=0)
    return b_low, tl.max(tl.where(m_ranked, b_scores, float("-inf")), axis=0)


@triton.jit
def weights_of(b_scores, b_low, b_high, m_ranked, WEIGHTS: tl.constexpr):
    """Return the weights of scores, int64; 0 where they are not ranked."""
    if WEIGHTS == "softmax":
        b_weight = _softmax_weights(b_scores, b_high, m_ranked)
    else:
        b_weight = scaled_scores(b_scores, b_low[None, :], b_high[None, :])
    return tl.where(m_ranked, b_weight, 0)


@triton.jit
def share_of(b_total, WEIGHTS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr):
    """Return what the blocks that are chosen by weight may weigh together, int64: all that fit, or do not reach it."""
    b_share = b_total.to(tl.float64) * tl.full([ROWS], SHARE, tl.float64)
    return tl.floor(b_share).to(tl.int64) if WEIGHTS == "softmax" else tl.ceil(b_share).to(tl.int64) - 1


@triton.jit
def _number_within(b_key, b_weight, b_limit, ROWS: tl.constexpr):
    """Return how many of the best, down each column, weigh `limit` or less together, int32 `[ROWS]`.

    Those with a key of INT_MIN do not count, and have no weight. Equal keys have equal weights.
    """
    # The greatest key from which on the weight exceeds the limit: the first block beyond the limit has it.
    b_beyond = tl.full([ROWS], INT_MIN, tl.int32)
    b_bit = b_beyond
    for _ in range(32):
        b_try = b_beyond ^ b_bit
        b_sum = tl.sum(tl.where(b_key >= b_try[None, :], b_weight, 0), axis=0)
        b_beyond = tl.where(b_sum > b_limit, b_try, b_beyond)
        b_bit = (b_bit >> 1) & INT_MAX
    m_above = b_key > b_beyond[None, :]
    b_above = tl.sum(m_above.to(tl.int32), axis=0)
    b_left = b_limit - tl.sum(tl.where(m_above, b_weight, 0), axis=0)
    # Some of those with this very key may still fit. Where all fit, the key is INT_MIN, and all that count are above.
    b_one = tl.max(tl.where(b_key == b_beyond[None, :], b_weight, 0), axis=0)
    return b_above + (b_left // tl.maximum(b_one, 1)).to(tl.int32) * (b_one > 0).to(tl.int32)


@triton.jit
def best(b_key, b_number, ROWS: tl.constexpr):
    """Return which are the best `b_number` `[ROWS]` down each column; the first wins a tie; INT_MIN is never chosen."""
    b_least = tl.full([ROWS], INT_MIN, tl.int32)
    b_bit = b_least
    for _ in range(32):
        b_try = b_least ^ b_bit
        b_count = tl.sum((b_key >= b_try[None, :]).to(tl.int32), axis=0)
        b_least = tl.where(b_count >= b_number, b_try, b_least)
        b_bit = (b_bit >> 1) & INT_MAX
    m_above = b_key > b_least[None, :]
    b_left = b_number - tl.sum(m_above.to(tl.int32), axis=0)
    m_tie = (b_key == b_least[None, :]) & (b_key > INT_MIN)
    return m_above | (m_tie & (tl.cumsum(m_tie.to(tl.int32), axis=0) <= b_left[None, :]))


@triton.jit
def store_bits(
    bits, m_selected, o_query, m_query, base, i_head, heads, num_words, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """Write the bits of blocks from `base`, a multiple of 32, on: int32 `[queries, heads, words]`."""
    # Each bit occurs once, so that a sum sets it; 1 << 31 wraps around to the sign.
    b_bit = tl.full([BLOCKS], 1, tl.int32) << (tl.arange(0, BLOCKS) % 32)
    b_bits = tl.where(m_selected, b_bit[:, None], 0)
    # [BLOCKS, ROWS] -> [words, 32, ROWS] -> [words, ROWS]
    b_words = tl.sum(tl.reshape(b_bits, [BLOCKS // 32, 32, ROWS]), axis=1)
    o_word = base // 32 + tl.arange(0, BLOCKS // 32)
    p_word = bits + ((o_query.to(tl.int64) * heads + i_head) * num_words)[None, :] + o_word[:, None]
    tl.store(p_word, b_words, mask=(o_word < num_words)[:, None] & m_query[None, :])


@triton.jit
def store_numbers(numbers, m_selected, b_place, o_query, m_query, o_block, i_head, heads, width):
    """Write the numbers of chosen blocks from place `b_place` `[ROWS]` on, `[queries, heads, width]`.

    Return the next places.
    """
    b_selected = m_selected.to(tl.int32)
    o_place = b_place[None, :] + tl.cumsum(b_selected, axis=0) - 1
    p_number = numbers + ((o_query.to(tl.int64) * heads + i_head) * width)[None, :] + o_place
    tl.store(p_number, o_block[:, None] + tl.zeros_like(o_place), mask=m_selected & m_query[None, :])
    return b_place + tl.sum(b_selected, axis=0)


@triton.jit
def load_tile(tiles, i_tile, ROWS: tl.constexpr):
    """Return (first block, end of the blocks, least number to choose, queries `[ROWS]`, which exist) of a tile."""
    p_tile = tiles + tl.cast(i_tile, tl.int64) * (TILE_HEADER + ROWS)
    o_query = tl.load(p_tile + TILE_HEADER + tl.arange(0, ROWS))
    m_query = o_query >= 0
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.where(m_query, o_query, 0), m_query


@triton.jit
def permitted(rule, o_query, m_query, o_block, m_block):
    """Return which blocks queries may choose, and which are their own, each `[BLOCKS, ROWS]`."""
    b_limit = tl.load(rule.limit + o_query, mask=m_query, other=-1)
    b_first = tl.load(rule.key_first + o_block, mask=m_block, other=INT_MAX)
    m_visible = b_first[:, None] <= b_limit[None, :]
    m_own = m_visible & False
    if rule.own_first is not None:
        b_own_first = tl.load(rule.own_first + o_query, mask=m_query, other=0)
        b_own_last = tl.load(rule.own_last + o_query, mask=m_query, other=-1)
        m_own = (o_block[:, None] >= b_own_first[None, :]) & (o_block[:, None] <= b_own_last[None, :]) & m_visible
    return m_visible, m_own


@triton.jit
def _competing(scores, rule, o_block, m_block, i_head):
    """Return which blocks compete, `[BLOCKS]`."""
    i_kv_head = i_head // (scores.heads // scores.kv_heads)
    p_competes = rule.block_competes + i_kv_head * scores.num_blocks + o_block
    return tl.load(p_competes, mask=m_block, other=0) != 0


@triton.jit
def ranked(b_scores, scores, rule, o_block, m_block, m_visible, m_own, i_head, OWN_COUNTS: tl.constexpr):
    """Return which blocks are ranked, `[BLOCKS, ROWS]`."""
    m_ranked = m_visible & (sortable(b_scores) > NEVER)
    if rule.block_competes is not None:
        m_ranked &= _competing(scores, rule, o_block, m_block, i_head)[:, None]
    if OWN_COUNTS:
        m_ranked |= m_own
    return m_ranked


@triton.jit
def besides(
    scores, rule, num_queries, o_query, m_query, o_block, m_block, m_visible, m_own, first, i_head,
    OWN_COUNTS: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Return which blocks are chosen whatever their rank, `[BLOCKS, ROWS]`."""
    m_chosen = m_visible & False
    if rule.block_competes is not None:
        m_chosen |= m_visible & ~_competing(scores, rule, o_block, m_block, i_head)[:, None]
    if rule.query_competes is not None:
        p_competes = rule.query_competes + tl.cast(i_head, tl.int64) * num_queries + o_query
        m_chosen |= m_visible & (tl.load(p_competes, mask=m_query, other=1) == 0)[None, :]
    if not OWN_COUNTS:
        m_chosen |= m_own
    if SINK:
        m_chosen |= m_visible & (o_block == first)[:, None]
    return m_chosen


@triton.jit
def choose_kernel(
    chosen, scores, tiles, rule, num_queries, width, most,
    WEIGHTS: tl.constexpr, SHARE: tl.constexpr, OWN_COUNTS: tl.constexpr, SINK: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """Choose the best blocks for each query of a tile and head, at most `most`, and those that are chosen besides.

    chosen: `[queries, heads, width]`, bits, or numbers. tiles: see `BlockCandidates.tiles`. WEIGHTS, SHARE, OWN_COUNTS,
    SINK: see `Ranking`.
    """
    i_tile, i_head = tl.program_id(0) // scores.heads, tl.program_id(0) % scores.heads
    first, stop, least, o_query, m_query = load_tile(tiles, i_tile, ROWS)
    base = first // 32 * 32
    o_block = base + tl.arange(0, BLOCKS)
    m_block = (o_block >= first) & (o_block < stop)
    b_scores = block_scores(scores, o_query, o_block, i_head, BLOCKS, ROWS)

    m_visible, m_own = permitted(rule, o_query, m_query, o_block, m_block)
    m_ranked = ranked(b_scores, scores, rule, o_block, m_block, m_visible, m_own, i_head, OWN_COUNTS)
    b_key = sortable(b_scores)
    if OWN_COUNTS:
        b_key = tl.where(m_own, HIGHEST, b_key)
    b_key = tl.where(m_ranked, b_key, INT_MIN)

    b_number = tl.full([ROWS], 0, tl.int32) + least
    if WEIGHTS != "none":
        b_low, b_high = extremes(b_scores, m_ranked)
        b_weight = weights_of(b_scores, b_low, b_high, m_ranked, WEIGHTS)
        b_limit = share_of(tl.sum(b_weight, axis=0), WEIGHTS, SHARE, ROWS)
        b_number = tl.maximum(b_number, _number_within(b_key, b_weight, b_limit, ROWS))
        if WEIGHTS == "scaled":
            b_number += 1
    # Never more, whatever the scores are: others reckon with it.
    m_selected = best(b_key, tl.minimum(b_number, most), ROWS)
    m_selected |= besides(
        scores, rule, num_queries, o_query, m_query, o_block, m_block, m_visible, m_own, first, i_head,
        OWN_COUNTS, SINK,
    )  # fmt: skip
    if NUMBERED:
        b_place = tl.zeros([ROWS], tl.int32)
        store_numbers(chosen, m_selected, b_place, o_query, m_query, o_block, i_head, scores.heads, width)
    else:
        store_bits(chosen, m_selected, o_query, m_query, base, i_head, scores.heads, width, BLOCKS, ROWS)

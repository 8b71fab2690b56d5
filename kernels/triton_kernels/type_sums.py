# pyright: reportMissingImports=false
"""What the types of keys learn from (NAtS, `kernels/lifetimes/gradient.py`): sums over pairs, and the gradient by them.

D_ij = exp(s_ij - L_i) (dout_i . v_j - delta_i) of all causal pairs is summed twice, in a fixed order: once over the
queries of a key, tile by tile as dk is, once over the keys of a query, as dq is. The queries that a key at 3
is summed over, if its next global tokens are 5 and 8, in a sequence of 10 with a window of 3:

    query         4 5 6 7 8 9
    LATER         D D D D D D
    UP_TO_NEXT    D D . . . .
    IN_WINDOW     D D D . . .
    AFTER_NEXT    . . D D D .
"""

import triton
import triton.language as tl

from farspan.kernels.lifetimes import gradient, lifetimes
from farspan.kernels.triton_kernels import tile

SUMS = tl.constexpr(gradient.SUMS)
LATER = tl.constexpr(gradient.LATER)
UP_TO_NEXT = tl.constexpr(gradient.UP_TO_NEXT)
IN_WINDOW = tl.constexpr(gradient.IN_WINDOW)
AFTER_NEXT = tl.constexpr(gradient.AFTER_NEXT)
SEEN_LOCALS = tl.constexpr(gradient.SEEN_LOCALS)
GLOBAL = tl.constexpr(lifetimes.GLOBAL)
LOCAL = tl.constexpr(lifetimes.LOCAL)


@triton.jit
def _positions(plan, queries):
    """Return the positions of queries `[BLOCK_Q]`; -1 of padding, which is later than no key."""
    o_row, _, m_row = queries
    b_position = tl.load(plan.terms.q_position + o_row, mask=m_row, other=-1)
    return tl.where(tl.load(plan.terms.q_document + o_row, mask=m_row, other=-1) >= 0, b_position, -1)


@triton.jit
def key_sums_kernel(
    q, k, v, dout, base, delta, sums, following, beyond, window, plan, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the sums over the queries of each key into float32 `[S, Hk, SUMS]`: all but SEEN_LOCALS.

    following, beyond: int32 `[Hk, S]`, positions of the next global token and of the one after it.
    """
    i_program = tl.program_id(0)
    i_tile = tl.load(plan.lists.order + i_program % plan.num_launched)
    i_kv_head = i_program // plan.num_launched
    keys = tile.tile_rows(plan.k_index, i_tile, plan.num_keys, BLOCK_K)
    o_key, m_key = keys
    # [BLOCK_K, padded D], [BLOCK_K, padded Dv]
    b_k = tile.load_keys(k, plan, i_tile, i_kv_head, BLOCK_K, True)
    b_v = tile.load_keys(v, plan, i_tile, i_kv_head, BLOCK_K, True)
    o_life = i_kv_head.to(tl.int64) * plan.num_keys + o_key
    b_key = tl.load(plan.terms.k_position + o_key, mask=m_key, other=0)
    b_next = tl.load(following + o_life, mask=m_key, other=-1)
    b_beyond = tl.load(beyond + o_life, mask=m_key, other=-1)
    # The last query with a sum of its own, beside that over all later ones; int64, as a window may reach anywhere.
    i_reach = tl.max(tl.maximum(b_beyond.to(tl.int64), b_key.to(tl.int64) + window), 0)
    b_later = tl.zeros([BLOCK_K], tl.float32)
    b_up_to_next = tl.zeros([BLOCK_K], tl.float32)
    b_in_window = tl.zeros([BLOCK_K], tl.float32)
    b_after_next = tl.zeros([BLOCK_K], tl.float32)
    share: tl.constexpr = plan.heads // plan.kv_heads
    for i_member in range(0, share):
        i_head = i_kv_head * share + i_member
        i_list = tl.load(plan.lists.group + i_head) * plan.num_tiles + i_tile
        for partial in tl.static_range(2):
            count, o_run, i_queries, remaining = tile.first_tile(plan.lists, 2 * i_list + partial)
            for _ in range(0, count):
                queries = tile.query_rows(plan, i_queries, i_head, BLOCK_Q)
                o_row, o_head, m_row = queries
                # [BLOCK_Q, padded D], [BLOCK_Q, padded Dv]
                b_q, b_dout = tile.load_queries(q, queries), tile.load_queries(dout, queries)
                o_statistic = o_head.to(tl.int64) * plan.num_queries + o_row
                b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
                b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
                # [BLOCK_K, BLOCK_Q]
                b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
                b_d = tl.math.exp2(b_scores * scale - b_base[None, :]) * (b_dp - b_delta[None, :])
                b_query = _positions(plan, queries)
                # In a full tile, too, a key may meet itself, and queries may be padding.
                m_later = b_query[None, :] > b_key[:, None]
                if partial:
                    m_later &= tile.evaluate_mask(plan, queries, keys, i_kv_head, True)
                # Hidden pairs may be anything, infinite too: dropped, not multiplied by 0.
                b_d = tl.where(m_later, b_d, 0.0)
                b_later += tl.sum(b_d, 1)
                if tl.min(b_query, 0) <= i_reach:
                    m_next = b_query[None, :] <= b_next[:, None]
                    b_up_to_next += tl.sum(tl.where(m_next, b_d, 0.0), 1)
                    m_window = b_query[None, :] - b_key[:, None] <= window
                    b_in_window += tl.sum(tl.where(m_window, b_d, 0.0), 1)
                    m_after = (b_query[None, :] <= b_beyond[:, None]) & (b_query[None, :] > b_next[:, None])
                    b_after_next += tl.sum(tl.where(m_after, b_d, 0.0), 1)
                o_run, i_queries, remaining = tile.next_tile(plan.lists, o_run, i_queries, remaining)
    p_sums = sums + (o_key.to(tl.int64) * plan.kv_heads + i_kv_head) * SUMS
    tl.store(p_sums + LATER, b_later, mask=m_key)
    tl.store(p_sums + UP_TO_NEXT, b_up_to_next, mask=m_key)
    tl.store(p_sums + IN_WINDOW, b_in_window, mask=m_key)
    tl.store(p_sums + AFTER_NEXT, b_after_next, mask=m_key)


@triton.jit
def query_sums_kernel(
    q, k, v, dout, base, delta, sums, plan, scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Write SEEN_LOCALS of each query into float32 `[T, Hk, SUMS]`; the plan's lifetimes leave local keys only."""
    i_program = tl.program_id(0)
    i_tile = tl.load(plan.lists.order + i_program % plan.num_launched)
    i_kv_head = i_program // plan.num_launched
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    share: tl.constexpr = plan.heads // plan.kv_heads
    for i_member in range(0, share):
        i_head = i_kv_head * share + i_member
        queries = tile.query_rows(plan, i_tile, i_head, BLOCK_Q)
        o_row, o_head, m_row = queries
        # [BLOCK_Q, padded D], [BLOCK_Q, padded Dv]
        b_q, b_dout = tile.load_queries(q, queries), tile.load_queries(dout, queries)
        o_statistic = o_head.to(tl.int64) * plan.num_queries + o_row
        b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
        b_query = _positions(plan, queries)
        i_list = tl.load(plan.lists.group + i_head) * plan.num_tiles + i_tile
        for partial in tl.static_range(2):
            count, o_run, i_keys, remaining = tile.first_tile(plan.lists, 2 * i_list + partial)
            for _ in range(0, count):
                # [BLOCK_K, padded D], [BLOCK_K, padded Dv]
                b_k = tile.load_keys(k, plan, i_keys, i_kv_head, BLOCK_K, partial)
                b_v = tile.load_keys(v, plan, i_keys, i_kv_head, BLOCK_K, partial)
                b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
                # [BLOCK_Q, BLOCK_K]
                b_d = tl.math.exp2(b_scores * scale - b_base[:, None]) * (b_dp - b_delta[:, None])
                keys = tile.tile_rows(plan.k_index, i_keys, plan.num_keys, BLOCK_K)
                o_key, m_key = keys
                b_key = tl.load(plan.terms.k_position + o_key, mask=m_key, other=0)
                m_later = b_query[:, None] > b_key[None, :]
                if partial:
                    m_later &= tile.evaluate_mask(plan, queries, keys, i_kv_head, False)
                b_sum += tl.sum(tl.where(m_later, b_d, 0.0), 1)
                o_run, i_keys, remaining = tile.next_tile(plan.lists, o_run, i_keys, remaining)
    o_row, _, m_row = tile.query_rows(plan, i_tile, 0, BLOCK_Q)
    o_result = (o_row.to(tl.int64) * plan.kv_heads + i_kv_head) * SUMS + SEEN_LOCALS
    tl.store(sums + o_result, b_sum, mask=m_row)


@triton.jit
def _later_run(is_new, a, b, next_is_new, next_a, next_b):
    """Combine running sums of two numbers that start anew where a run begins."""
    m_new = next_is_new != 0
    return is_new | next_is_new, tl.where(m_new, next_a, a + next_a), tl.where(m_new, next_b, b + next_b)


@triton.jit
def type_gradient_kernel(
    sums, types, index, gradient_out, num_tokens, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the gradient of the one-hot types of a KV head, float64 `[tokens, Hk, 3]`, by `sums` `[tokens, Hk, SUMS]`.

    types: int32 `[Hk, tokens]`. index: int64 `[tokens]`, the token at each place in document order.
    """
    i_head = tl.program_id(0)
    o_nth = tl.arange(0, BLOCK)
    # Sums of the run at hand before the tokens of a step: of columns, those after the next token, and rows.
    i_columns = tl.zeros([1], tl.float64)
    i_after = tl.zeros([1], tl.float64)
    i_rows = tl.zeros([1], tl.float64)
    for i_start in range(0, num_tokens, BLOCK):
        o_place = i_start + o_nth
        m_token = o_place < num_tokens
        # What ends before a token is a sum up to the place before it.
        m_before = m_token & (o_place > 0)
        o_token = tl.load(index + o_place, mask=m_token, other=0)
        o_before = tl.load(index + o_place - 1, mask=m_before, other=0)
        b_type = tl.load(types + i_head * num_tokens + o_token, mask=m_token, other=GLOBAL)
        b_type_before = tl.load(types + i_head * num_tokens + o_before, mask=m_before, other=GLOBAL)
        p_sums = sums + (o_token * KV_HEADS + i_head) * SUMS
        p_before = sums + (o_before * KV_HEADS + i_head) * SUMS
        m_local = m_before & (b_type_before == LOCAL)
        b_columns = tl.load(p_before + UP_TO_NEXT, mask=m_local, other=0.0).to(tl.float64)
        b_after = tl.load(p_before + AFTER_NEXT, mask=m_local, other=0.0).to(tl.float64)
        b_rows = tl.load(p_sums + SEEN_LOCALS, mask=m_token & (b_type != GLOBAL), other=0.0).to(tl.float64)
        b_new_before, b_columns, b_after = tl.associative_scan(
            ((b_type_before == GLOBAL).to(tl.int32), b_columns, b_after), 0, _later_run
        )
        b_new, b_rows, _ = tl.associative_scan(((b_type == GLOBAL).to(tl.int32), b_rows, b_rows), 0, _later_run)
        b_columns = tl.where(b_new_before != 0, b_columns, b_columns + i_columns)
        b_after = tl.where(b_new_before != 0, b_after, b_after + i_after)
        b_rows = tl.where(b_new != 0, b_rows, b_rows + i_rows)
        b_of_locals = tl.where(b_type == GLOBAL, b_after, b_columns - b_rows)
        p_gradient = gradient_out + (o_token * KV_HEADS + i_head) * 3
        b_later = tl.load(p_sums + LATER, mask=m_token, other=0.0).to(tl.float64)
        tl.store(p_gradient, b_later - b_of_locals, mask=m_token)
        tl.store(p_gradient + 1, tl.load(p_sums + UP_TO_NEXT, mask=m_token, other=0.0).to(tl.float64), mask=m_token)
        tl.store(p_gradient + 2, tl.load(p_sums + IN_WINDOW, mask=m_token, other=0.0).to(tl.float64), mask=m_token)
        m_last = o_nth == BLOCK - 1
        i_columns = tl.sum(tl.where(m_last, b_columns, 0.0), 0, keep_dims=True)
        i_after = tl.sum(tl.where(m_last, b_after, 0.0), 0, keep_dims=True)
        i_rows = tl.sum(tl.where(m_last, b_rows, 0.0), 0, keep_dims=True)

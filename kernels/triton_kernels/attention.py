# pyright: reportMissingImports=false
"""Flash attention kernels (arXiv 2205.14135, 2307.08691) over the lists of a block mask.

A tile of queries is consecutive rows of one head, or GATHERED: rows of any heads of one KV head, named by row * HEADS +
head, whose results go to slots, one for each row of each tile. Scores are scaled inside the exponent, base 2: exp2 is
one instruction, exp is two.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels.tile import (
    LN2,
    LOG2E,
    evaluate_mask,
    first_tile,
    load_keys,
    load_queries,
    next_tile,
    query_rows,
    result_offsets,
    tile_rows,
)


@triton.jit
def _query_program(lists, num_tiles, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GATHERED: tl.constexpr):
    """Return (tile, query head, KV head, list) of this program of a query-stationary kernel."""
    i_program = tl.program_id(0)
    if GATHERED:
        i_tile = tl.load(lists.order + i_program)
        i_head = 0
        i_kv_head = tl.load(lists.group + i_tile)
        i_list = i_tile
    else:
        # Heads that share keys run side by side, so that L2 serves all but the first of them.
        share: tl.constexpr = HEADS // KV_HEADS
        i_tile = tl.load(lists.order + i_program // share % num_tiles)
        i_kv_head = i_program // share // num_tiles
        i_head = i_kv_head * share + i_program % share
        i_list = tl.load(lists.group + i_head) * num_tiles + i_tile
    return i_tile, i_head, i_kv_head, i_list


@triton.jit
def _forward_list(
    b_out, b_sum, b_max, b_q, k, v, k_index, terms, lists, i_list, o_row, o_head, m_row, i_kv_head, num_queries,
    num_keys, scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Attend to all key tiles of half a list; b_max: the greatest scaled score so far, base 2, -inf before any."""
    count, o_run, i_tile, remaining = first_tile(lists, 2 * i_list + PARTIAL)
    for _ in range(0, count):
        # [BLOCK_K, PADDED_DIM]
        b_k = load_keys(k, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, PARTIAL)
        # [BLOCK_Q, BLOCK_K]; "ieee": no TF32 for float32, which is for checks.
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if PARTIAL:
            o_key, m_key = tile_rows(k_index, i_tile, num_keys, BLOCK_K)
            mask = evaluate_mask(
                terms, o_row[:, None], o_head[:, None], m_row[:, None], o_key[None, :], m_key[None, :], i_kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            b_scores = tl.where(mask, b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
        # For a row without any key yet: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) if PARTIAL else b_new_max
        b_p = tl.math.exp2(b_scores * scale - b_base[:, None])
        # What was summed under the old maximum is rescaled before this tile is added.
        b_rescale = tl.math.exp2(b_max - b_base)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        # [BLOCK_K, PADDED_VALUE]
        b_v = load_keys(v, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, PARTIAL)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
        b_max = b_new_max
        o_run, i_tile, remaining = next_tile(lists, o_run, i_tile, remaining)
    return b_out, b_sum, b_max


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """Write out and lse, float32: `[T, HEADS, VALUE_DIM]` and `[T, HEADS]`, or by slot. scale: times log2(e)."""
    i_tile, i_head, i_kv_head, i_list = _query_program(lists, num_tiles, HEADS, KV_HEADS, GATHERED)
    o_row, o_head, m_row = query_rows(q_index, i_tile, i_head, num_queries, BLOCK_Q, HEADS, GATHERED)
    # Queries, sums and maxima stay in registers for all key tiles.
    # [BLOCK_Q, PADDED_DIM]
    b_q = load_queries(q, o_row, o_head, m_row, HEAD_DIM, PADDED_DIM)
    b_out = tl.zeros([BLOCK_Q, PADDED_VALUE], tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    # Full tiles first, in a loop of their own without the mask; then partial ones.
    for partial in tl.static_range(2):
        b_out, b_sum, b_max = _forward_list(
            b_out, b_sum, b_max, b_q, k, v, k_index, terms, lists, i_list, o_row, o_head, m_row, i_kv_head,
            num_queries, num_keys, scale, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_K, partial,
        )  # fmt: skip
    # Full tiles do not check whether a query is padding.
    m_token = tl.load(terms.q_document + o_row, mask=m_row, other=-1) >= 0
    m_attends = m_token & (b_sum > 0)
    b_out = tl.where(m_attends[:, None], b_out / tl.where(m_attends, b_sum, 1.0)[:, None], 0.0)
    b_lse = tl.where(m_attends, (b_max + tl.math.log2(tl.where(m_attends, b_sum, 1.0))) * LN2, float("-inf"))
    o_result = result_offsets(i_tile, o_row, o_head, BLOCK_Q, HEADS, GATHERED)
    o_column = tl.arange(0, PADDED_VALUE)
    mask = m_row[:, None] & (o_column < VALUE_DIM)[None, :]
    tl.store(out + o_result[:, None] * VALUE_DIM + o_column[None, :], b_out, mask=mask)
    tl.store(lse + o_result, b_lse, mask=m_row)


@triton.jit
def delta_kernel(
    dout, out, lse, delta, base, q_document, num_queries,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write delta = rowsum(dout * out) and base = lse * log2(e), float32 `[HEADS, T]`.

    Rows that attend to nothing have base inf instead of -inf: exp2(score - inf) is the 0 that their gradients need.
    """
    i_head = tl.program_id(0) % HEADS
    o_row = tl.program_id(0) // HEADS * BLOCK + tl.arange(0, BLOCK)
    o_head = tl.zeros_like(o_row) + i_head
    m_row = o_row < num_queries
    # [BLOCK, PADDED_VALUE]
    b_product = load_queries(dout, o_row, o_head, m_row, VALUE_DIM, PADDED_VALUE).to(tl.float32)
    b_product *= load_queries(out, o_row, o_head, m_row, VALUE_DIM, PADDED_VALUE).to(tl.float32)
    b_lse = tl.load(lse + o_row.to(tl.int64) * HEADS + i_head, mask=m_row, other=0.0).to(tl.float32)
    m_token = tl.load(q_document + o_row, mask=m_row, other=-1) >= 0
    m_attends = m_token & (b_lse > float("-inf"))
    # Heads first: the backward kernels read rows of one head.
    o_result = i_head.to(tl.int64) * num_queries + o_row
    tl.store(delta + o_result, tl.sum(b_product, 1), mask=m_row)
    tl.store(base + o_result, tl.where(m_attends, b_lse * LOG2E, float("inf")), mask=m_row)


@triton.jit
def _dq_list(
    b_dq, b_q, b_dout, b_base, b_delta, k, v, k_index, terms, lists, i_list, o_row, o_head, m_row, i_kv_head,
    num_queries, num_keys, scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PADDED_VALUE: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add dS K over all key tiles of half a list; dS = P * (dO V^T - delta) (arXiv 2205.14135, appendix B.2)."""
    count, o_run, i_tile, remaining = first_tile(lists, 2 * i_list + PARTIAL)
    for _ in range(0, count):
        # [BLOCK_K, PADDED_DIM]
        b_k = load_keys(k, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, PARTIAL)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        # [BLOCK_Q, BLOCK_K]; the final lse is known, so nothing is rescaled.
        b_p = tl.math.exp2(b_scores * scale - b_base[:, None])
        if PARTIAL:
            o_key, m_key = tile_rows(k_index, i_tile, num_keys, BLOCK_K)
            mask = evaluate_mask(
                terms, o_row[:, None], o_head[:, None], m_row[:, None], o_key[None, :], m_key[None, :], i_kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            b_p = tl.where(mask, b_p, 0.0)
        # [BLOCK_K, PADDED_VALUE]
        b_v = load_keys(v, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, PARTIAL)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        o_run, i_tile, remaining = next_tile(lists, o_run, i_tile, remaining)
    return b_dq


@triton.jit
def dq_kernel(
    q, k, v, dout, base, delta, dq, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale, dscale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """Write dq, float32: `[T, HEADS, HEAD_DIM]`, or by slot. dscale: the scale without log2(e)."""
    i_tile, i_head, i_kv_head, i_list = _query_program(lists, num_tiles, HEADS, KV_HEADS, GATHERED)
    o_row, o_head, m_row = query_rows(q_index, i_tile, i_head, num_queries, BLOCK_Q, HEADS, GATHERED)
    # [BLOCK_Q, PADDED_DIM], [BLOCK_Q, PADDED_VALUE]
    b_q = load_queries(q, o_row, o_head, m_row, HEAD_DIM, PADDED_DIM)
    b_dout = load_queries(dout, o_row, o_head, m_row, VALUE_DIM, PADDED_VALUE)
    o_statistic = o_head.to(tl.int64) * num_queries + o_row
    b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
    b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
    b_dq = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    for partial in tl.static_range(2):
        b_dq = _dq_list(
            b_dq, b_q, b_dout, b_base, b_delta, k, v, k_index, terms, lists, i_list, o_row, o_head, m_row, i_kv_head,
            num_queries, num_keys, scale, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_K,
            partial,
        )  # fmt: skip
    o_result = result_offsets(i_tile, o_row, o_head, BLOCK_Q, HEADS, GATHERED)
    o_column = tl.arange(0, PADDED_DIM)
    mask = m_row[:, None] & (o_column < HEAD_DIM)[None, :]
    # Scaled once at the end, not at every tile.
    tl.store(dq + o_result[:, None] * HEAD_DIM + o_column[None, :], b_dq * dscale, mask=mask)


@triton.jit
def _dkv_list(
    b_dk, b_dv, b_k, b_v, q, dout, base, delta, q_index, terms, lists, i_list, o_key, m_key, i_head, i_kv_head,
    num_queries, num_keys, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, GATHERED: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over all query tiles of half a list of the key tile."""
    count, o_run, i_tile, remaining = first_tile(lists, 2 * i_list + PARTIAL)
    for _ in range(0, count):
        o_row, o_head, m_row = query_rows(q_index, i_tile, i_head, num_queries, BLOCK_Q, HEADS, GATHERED)
        # [BLOCK_Q, PADDED_DIM]
        b_q = load_queries(q, o_row, o_head, m_row, HEAD_DIM, PADDED_DIM)
        o_statistic = o_head.to(tl.int64) * num_queries + o_row
        b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
        # [BLOCK_K, BLOCK_Q]: transposed, so that scores are the left operand of both sums without another layout.
        b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.math.exp2(b_scores * scale - b_base[None, :])
        if PARTIAL:
            mask = evaluate_mask(
                terms, o_row[None, :], o_head[None, :], m_row[None, :], o_key[:, None], m_key[:, None], i_kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            b_p = tl.where(mask, b_p, 0.0)
        # [BLOCK_Q, PADDED_VALUE]
        b_dout = load_queries(dout, o_row, o_head, m_row, VALUE_DIM, PADDED_VALUE)
        if FOR_V:
            b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        if FOR_K:
            b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        o_run, i_tile, remaining = next_tile(lists, o_run, i_tile, remaining)
    return b_dk, b_dv


@triton.jit
def dkv_kernel(
    q, k, v, dout, base, delta, dk, dv, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale, dscale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr, FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Write dk `[S, KV_HEADS, HEAD_DIM]`, dv `[S, KV_HEADS, VALUE_DIM]` or both, float32; gathered queries add."""
    i_program = tl.program_id(0)
    i_tile = tl.load(lists.order + i_program % num_tiles)
    i_kv_head = i_program // num_tiles
    o_key, m_key = tile_rows(k_index, i_tile, num_keys, BLOCK_K)
    # Keys, values and both sums stay in registers; queries of all heads that share the keys pass by, so that no two
    # programs add to the same row.
    # [BLOCK_K, PADDED_DIM], [BLOCK_K, PADDED_VALUE]
    b_k = load_keys(k, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, True)
    b_v = load_keys(v, k_index, i_tile, i_kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, True)
    b_dk = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    b_dv = tl.zeros([BLOCK_K, PADDED_VALUE], tl.float32)
    # Gathered queries of all heads of the group are on one list.
    share: tl.constexpr = 1 if GATHERED else HEADS // KV_HEADS
    for i_member in range(0, share):
        i_head = i_kv_head * share + i_member
        i_list = tl.load(lists.group + i_head) * num_tiles + i_tile
        for partial in tl.static_range(2):
            b_dk, b_dv = _dkv_list(
                b_dk, b_dv, b_k, b_v, q, dout, base, delta, q_index, terms, lists, i_list, o_key, m_key, i_head,
                i_kv_head, num_queries, num_keys, scale, HEADS, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_Q,
                GATHERED, FOR_K, FOR_V, partial,
            )  # fmt: skip
    o_result = o_key.to(tl.int64) * KV_HEADS + i_kv_head
    if FOR_K:
        _store_keys(dk, b_dk * dscale, o_result, m_key, HEAD_DIM, PADDED_DIM, GATHERED)
    if FOR_V:
        _store_keys(dv, b_dv, o_result, m_key, VALUE_DIM, PADDED_VALUE, GATHERED)


@triton.jit
def _store_keys(result, b_rows, o_result, m_row, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    """Write, or add, rows `[BLOCK, PADDED]` to float32 rows of WIDTH; no other program writes to these."""
    o_column = tl.arange(0, PADDED)
    pointers = result + o_result[:, None] * WIDTH + o_column[None, :]
    mask = m_row[:, None] & (o_column < WIDTH)[None, :]
    if ADD:
        # Loading the old sums would take as many registers as b_rows has, and spill them; the atomic adds in L2.
        tl.atomic_add(pointers, b_rows, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, b_rows, mask=mask)


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, slot_offsets, slots, num_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the slots of each row of each head into float32 `[rows * heads, WIDTH]`, in the order of `slots`.

    With part_lse: partial results of attention, weighted by log-sum-exp, and lse `[rows * heads]` is written too.
    Without: summands.
    """
    # A fixed order of slots, one program for each row: the same bits every time.
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < num_rows
    o_column = tl.arange(0, PADDED)
    m_column = (o_column < WIDTH)[None, :]
    o_first = tl.load(slot_offsets + o_row, mask=m_row, other=0)
    b_count = tl.load(slot_offsets + o_row + 1, mask=m_row, other=0) - o_first
    b_acc = tl.zeros([BLOCK, PADDED], tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for i_slot in range(0, tl.max(b_count, 0)):
        m_slot = i_slot < b_count
        o_slot = tl.load(slots + o_first + i_slot, mask=m_slot, other=0).to(tl.int64)
        # [BLOCK, PADDED]
        b_part = tl.load(part + o_slot[:, None] * WIDTH + o_column[None, :], mask=m_slot[:, None] & m_column, other=0.0)
        if part_lse is None:
            b_acc += b_part
        else:
            b_lse = tl.load(part_lse + o_slot, mask=m_slot, other=float("-inf"))
            b_new_max = tl.maximum(b_max, b_lse)
            b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rescale, b_weight = tl.exp(b_max - b_base), tl.exp(b_lse - b_base)
            b_sum = b_sum * b_rescale + b_weight
            b_acc = b_acc * b_rescale[:, None] + b_part * b_weight[:, None]
            b_max = b_new_max
    if part_lse is not None:
        m_attends = b_sum > 0
        b_divisor = tl.where(m_attends, b_sum, 1.0)
        b_acc = b_acc / b_divisor[:, None]
        tl.store(lse + o_row, tl.where(m_attends, b_max + tl.log(b_divisor), float("-inf")), mask=m_row)
    tl.store(out + o_row[:, None] * WIDTH + o_column[None, :], b_acc, mask=m_row[:, None] & m_column)

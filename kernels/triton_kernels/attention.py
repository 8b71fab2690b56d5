# pyright: reportMissingImports=false
"""Flash attention kernels (arXiv 2205.14135, 2307.08691) over the lists of a block mask, and the steps they consist of.

A tile of queries is consecutive rows of one head. Scores are scaled inside the exponent, base 2: exp2 is one
instruction, exp is two. `plan` is a `KernelPlan`; q, k, v and dout are each an `Operand`. Steps, of one tile of queries
and one of keys, serve the kernels of gathered rows too (gathered.py); `partial`: whether the mask has to be evaluated.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels import tile


@triton.jit
def _query_program(plan, BLOCK: tl.constexpr):
    """Return (queries, KV head, list) of this program of a query-stationary kernel."""
    i_program = tl.program_id(0)
    # Heads that share keys run side by side, so that L2 serves all but the first of them.
    share: tl.constexpr = plan.heads // plan.kv_heads
    i_tile = tl.load(plan.lists.order + i_program // share % plan.num_launched)
    i_kv_head = i_program // share // plan.num_launched
    i_head = i_kv_head * share + i_program % share
    i_list = tl.load(plan.lists.group + i_head) * plan.num_tiles + i_tile
    return tile.query_rows(plan, i_tile, i_head, BLOCK), i_kv_head, i_list


@triton.jit
def forward_step(
    b_q, b_out, b_sum, b_max, k, v, plan, queries, i_keys, i_kv_head, scale, partial,
    BLOCK_K: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Return out, not yet divided by the sum, the sum, and the greatest scaled score, base 2, with one tile more."""
    # [BLOCK_K, padded D]
    b_k = tile.load_keys(k, plan, i_keys, i_kv_head, BLOCK_K, SHORT)
    # [BLOCK_Q, BLOCK_K]; "ieee": no TF32 for float32, which is for checks.
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if partial:
        keys = tile.tile_rows(plan.k_index, i_keys, plan.num_keys, BLOCK_K)
        b_scores = tl.where(tile.evaluate_mask(plan, queries, keys, i_kv_head, False), b_scores, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    # For a row without any key yet: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
    b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) if SHORT else b_new_max
    b_p = tl.math.exp2(b_scores * scale - b_base[:, None])
    # What was summed under the old maximum is rescaled before this tile is added.
    b_rescale = tl.math.exp2(b_max - b_base)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    # [BLOCK_K, padded Dv]
    b_v = tile.load_keys(v, plan, i_keys, i_kv_head, BLOCK_K, SHORT)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
    return b_out, b_sum, b_new_max


@triton.jit
def normalize(b_out, b_sum, b_max, m_token):
    """Return out and its log-sum-exp, base 2; 0 and -inf for rows that attend to nothing."""
    # A sum of NaN, which compares as no number, must come out.
    m_attends = m_token & (b_sum != 0)
    b_divisor = tl.where(m_attends, b_sum, 1.0)
    b_out = tl.where(m_attends[:, None], b_out / b_divisor[:, None], 0.0)
    return b_out, tl.where(m_attends, b_max + tl.math.log2(b_divisor), float("-inf"))


@triton.jit
def dq_step(
    b_dq, b_q, b_dout, b_base, b_delta, k, v, plan, queries, i_keys, i_kv_head, scale, partial,
    BLOCK_K: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Return b_dq with dS K of one tile more, dS = P * (dO V^T - delta) (arXiv 2205.14135, appendix B.2)."""
    # [BLOCK_K, padded D]
    b_k = tile.load_keys(k, plan, i_keys, i_kv_head, BLOCK_K, SHORT)
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    # [BLOCK_Q, BLOCK_K]; the final lse is known, so nothing is rescaled.
    b_p = tl.math.exp2(b_scores * scale - b_base[:, None])
    if partial:
        keys = tile.tile_rows(plan.k_index, i_keys, plan.num_keys, BLOCK_K)
        b_p = tl.where(tile.evaluate_mask(plan, queries, keys, i_kv_head, False), b_p, 0.0)
    # [BLOCK_K, padded Dv]
    b_v = tile.load_keys(v, plan, i_keys, i_kv_head, BLOCK_K, SHORT)
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def dkv_step(
    b_dk, b_dv, b_k, b_v, q, dout, base, delta, plan, queries, keys, i_kv_head, scale, partial,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Return b_dk with dS^T Q and b_dv with P^T dO of one tile of queries more."""
    o_row, o_head, m_row = queries
    # [BLOCK_Q, padded D]
    b_q = tile.load_queries(q, queries)
    o_statistic = o_head.to(tl.int64) * plan.num_queries + o_row
    b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
    # [BLOCK_K, BLOCK_Q]: transposed, so that scores are the left operand of both sums without another layout.
    b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_p = tl.math.exp2(b_scores * scale - b_base[None, :])
    if partial:
        b_p = tl.where(tile.evaluate_mask(plan, queries, keys, i_kv_head, True), b_p, 0.0)
    # [BLOCK_Q, padded Dv]
    b_dout = tile.load_queries(dout, queries)
    if FOR_V:
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
    if FOR_K:
        b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def store_gradients(
    dk, b_dk, dv, b_dv, plan, keys, i_kv_head, k, v, FOR_K: tl.constexpr, FOR_V: tl.constexpr
):  # fmt: skip
    """Write the gradients of a tile of keys, of values, or both."""
    o_key, m_key = keys
    o_result = o_key.to(tl.int64) * plan.kv_heads + i_kv_head
    if FOR_K:
        tile.store_rows(dk, b_dk, o_result, m_key, k)
    if FOR_V:
        tile.store_rows(dv, b_dv, o_result, m_key, v)


@triton.jit
def forward_kernel(q, k, v, out, lse, plan, scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write out and lse, float32: `[T, Hq, Dv]` and `[T, Hq]`. scale: times log2(e)."""
    queries, i_kv_head, i_list = _query_program(plan, BLOCK_Q)
    o_row, o_head, m_row = queries
    # Queries, sums and maxima stay in registers for all key tiles.
    # [BLOCK_Q, padded D]
    b_q = tile.load_queries(q, queries)
    b_out = tl.zeros([BLOCK_Q, v.padded], tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    # Full tiles first, in a loop of their own without the mask; then partial ones.
    for partial in tl.static_range(2):
        count, o_run, i_keys, remaining = tile.first_tile(plan.lists, 2 * i_list + partial)
        for _ in range(0, count):
            b_out, b_sum, b_max = forward_step(
                b_q, b_out, b_sum, b_max, k, v, plan, queries, i_keys, i_kv_head, scale, partial, BLOCK_K, partial
            )
            o_run, i_keys, remaining = tile.next_tile(plan.lists, o_run, i_keys, remaining)
    # Full tiles do not check whether a query is padding.
    m_token = tl.load(plan.terms.q_document + o_row, mask=m_row, other=-1) >= 0
    b_out, b_lse = normalize(b_out, b_sum, b_max, m_token)
    # int64: rows x heads x width exceeds 2^31 from a few million tokens on.
    o_result = o_row.to(tl.int64) * plan.heads + o_head
    tile.store_rows(out, b_out, o_result, m_row, v)
    tl.store(lse + o_result, b_lse * tile.LN2, mask=m_row)


@triton.jit
def delta_kernel(
    dout, out, lse, delta, base, q_document, num_queries, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write delta = rowsum(dout * out) and base = lse * log2(e), float32 `[Hq, T]`.

    Rows that attend to nothing have base inf instead of -inf: exp2(score - inf) is the 0 that their gradients need.
    """
    i_head = tl.program_id(0) % HEADS
    o_row = tl.program_id(0) // HEADS * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < num_queries
    queries = o_row, tl.zeros_like(o_row) + i_head, m_row
    # [BLOCK, padded Dv]
    b_product = tile.load_queries(dout, queries).to(tl.float32)
    b_product *= tile.load_queries(out, queries).to(tl.float32)
    b_lse = tl.load(lse + o_row.to(tl.int64) * HEADS + i_head, mask=m_row, other=0.0).to(tl.float32)
    m_token = tl.load(q_document + o_row, mask=m_row, other=-1) >= 0
    m_attends = m_token & (b_lse != float("-inf"))
    # Heads first: the backward kernels read rows of one head.
    o_result = i_head.to(tl.int64) * num_queries + o_row
    tl.store(delta + o_result, tl.sum(b_product, 1), mask=m_row)
    tl.store(base + o_result, tl.where(m_attends, b_lse * tile.LOG2E, float("inf")), mask=m_row)


@triton.jit
def dq_kernel(q, k, v, dout, base, delta, dq, plan, scale, dscale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write dq, float32 `[T, Hq, D]`. dscale: the scale without log2(e)."""
    queries, i_kv_head, i_list = _query_program(plan, BLOCK_Q)
    o_row, o_head, m_row = queries
    # [BLOCK_Q, padded D], [BLOCK_Q, padded Dv]
    b_q, b_dout = tile.load_queries(q, queries), tile.load_queries(dout, queries)
    o_statistic = o_head.to(tl.int64) * plan.num_queries + o_row
    b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
    b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
    b_dq = tl.zeros([BLOCK_Q, q.padded], tl.float32)
    for partial in tl.static_range(2):
        count, o_run, i_keys, remaining = tile.first_tile(plan.lists, 2 * i_list + partial)
        for _ in range(0, count):
            b_dq = dq_step(
                b_dq,
                b_q,
                b_dout,
                b_base,
                b_delta,
                k,
                v,
                plan,
                queries,
                i_keys,
                i_kv_head,
                scale,
                partial,
                BLOCK_K,
                partial,
            )
            o_run, i_keys, remaining = tile.next_tile(plan.lists, o_run, i_keys, remaining)
    # Scaled once at the end, not at every tile.
    tile.store_rows(dq, b_dq * dscale, o_row.to(tl.int64) * plan.heads + o_head, m_row, q)


@triton.jit
def dkv_kernel(
    q, k, v, dout, base, delta, dk, dv, plan, scale, dscale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Write dk `[S, Hk, D]`, dv `[S, Hk, Dv]` or both, float32: the sums of dS^T Q and P^T dO."""
    i_program = tl.program_id(0)
    i_tile = tl.load(plan.lists.order + i_program % plan.num_launched)
    i_kv_head = i_program // plan.num_launched
    keys = tile.tile_rows(plan.k_index, i_tile, plan.num_keys, BLOCK_K)
    # Keys, values and both sums stay in registers; queries of all heads that share the keys pass by, so that no two
    # programs add to the same row.
    # [BLOCK_K, padded D], [BLOCK_K, padded Dv]
    b_k = tile.load_keys(k, plan, i_tile, i_kv_head, BLOCK_K, True)
    b_v = tile.load_keys(v, plan, i_tile, i_kv_head, BLOCK_K, True)
    b_dk = tl.zeros([BLOCK_K, k.padded], tl.float32)
    b_dv = tl.zeros([BLOCK_K, v.padded], tl.float32)
    share: tl.constexpr = plan.heads // plan.kv_heads
    for i_member in range(0, share):
        i_head = i_kv_head * share + i_member
        i_list = tl.load(plan.lists.group + i_head) * plan.num_tiles + i_tile
        for partial in tl.static_range(2):
            count, o_run, i_queries, remaining = tile.first_tile(plan.lists, 2 * i_list + partial)
            for _ in range(0, count):
                queries = tile.query_rows(plan, i_queries, i_head, BLOCK_Q)
                b_dk, b_dv = dkv_step(
                    b_dk, b_dv, b_k, b_v, q, dout, base, delta, plan, queries, keys, i_kv_head, scale, partial,
                    FOR_K, FOR_V,
                )  # fmt: skip
                o_run, i_queries, remaining = tile.next_tile(plan.lists, o_run, i_queries, remaining)
    store_gradients(dk, b_dk * dscale, dv, b_dv, plan, keys, i_kv_head, k, v, FOR_K, FOR_V)

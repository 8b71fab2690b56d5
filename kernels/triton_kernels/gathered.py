# pyright: reportMissingImports=false
"""Flash attention kernels where single rows select key blocks: rows of any heads that select a block make up its tiles.

A program of the kernels of queries has one chunk of rows and one KV head. It visits the blocks of keys one after
another, takes its own part of the list of each, tile by tile, and goes on with out, or dq, of these rows where the last
block left it in memory. No other program touches these rows: there are no partial results to merge, and the bits are
the same every time. A program of the kernel of keys has one tile of them, and walks the whole list of its block.

`plan` is a `GatheredPlan` (gathered_launch.py); row_lists.py shows the lists, row_tables.py the tables.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels import attention, tile


@triton.jit
def _list(plan, i_block, i_kv_head, i_chunk):
    """Return (start, length) of this chunk's part of the list of a block."""
    i_list = (i_block.to(tl.int64) * plan.kv_heads + i_kv_head) * plan.num_chunks + i_chunk
    o_start = tl.load(plan.starts + i_list)
    return o_start, (tl.load(plan.starts + i_list + 1) - o_start).to(tl.int32)


@triton.jit
def _queries(plan, o_start, o_nth, count, BLOCK: tl.constexpr):
    """Return ((rows, heads, which of them exist), row * heads + head), each `[BLOCK]`, of a tile of a list."""
    o_nth += tl.arange(0, BLOCK)
    m_row = o_nth < count
    o_pair = tl.load(plan.members + o_start + o_nth, mask=m_row, other=0)
    return (o_pair // plan.heads, o_pair % plan.heads, m_row), o_pair.to(tl.int64)


@triton.jit
def _sees(plan, queries, p_ranks):
    """Return whether some row may attend to some keys of these ranks, and whether the mask may hide some from some row.

    p_ranks: the lowest rank, which is below all others where keys are missing, as the mask must hide them; the highest.
    """
    low, high = tl.load(p_ranks), tl.load(p_ranks + 1)
    o_row, o_head, m_row = queries
    terms = plan.terms
    o_window = tl.load(terms.window + o_head).to(tl.int64) * plan.num_queries + o_row
    b_first = tl.load(terms.q_first + o_window, mask=m_row, other=0)
    b_last = tl.load(terms.q_last + o_window, mask=m_row, other=-1)
    m_some, m_all = (b_first <= high) & (b_last >= low), (b_first <= low) & (b_last >= high)
    if terms.q_first_sink is not None:
        b_first = tl.load(terms.q_first_sink + o_row, mask=m_row, other=0)
        b_last = tl.load(terms.q_last_sink + o_row, mask=m_row, other=-1)
        m_some, m_all = m_some | ((b_first <= high) & (b_last >= low)), m_all | ((b_first <= low) & (b_last >= high))
    if terms.k_coordinates is not None:
        # Ranks do not tell what a neighborhood shows.
        m_all = m_all & False
    return tl.max((m_some & m_row).to(tl.int32), 0) != 0, tl.max((m_row & ~m_all).to(tl.int32), 0) != 0


@triton.jit
def _program(plan):
    """Return (first block to visit, last + 1, chunk, KV head) of this program of a kernel of queries."""
    i_chunk, i_kv_head = tl.program_id(0) // plan.kv_heads, tl.program_id(0) % plan.kv_heads
    return tl.load(plan.visits + 2 * i_chunk), tl.load(plan.visits + 2 * i_chunk + 1), i_chunk, i_kv_head


@triton.jit
def gathered_forward_kernel(q, k, v, out, lse, plan, scale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Merge attention to the selected blocks into out `[T, Hq, Dv]` and lse `[T, Hq]`, float32, lse in base 2.

    scale: times log2(e).
    """
    i_begin, i_end, i_chunk, i_kv_head = _program(plan)
    for i_nth in range(i_begin, i_end):
        p_block = plan.blocks + 5 * i_nth
        o_start, count = _list(plan, tl.load(p_block), i_kv_head, i_chunk)
        for o_nth in range(0, count, BLOCK_Q):
            queries, o_pair = _queries(plan, o_start, o_nth, count, BLOCK_Q)
            some, partial = _sees(plan, queries, p_block + 3)
            if some:
                i_first, i_stop = tl.load(p_block + 1), tl.load(p_block + 2)
                # [BLOCK_Q, padded D]
                b_q = tile.load_queries(q, queries)
                # The rows may be those that other threads wrote in the last tile.
                tl.debug_barrier()
                # Softmax goes on where it stopped, as if sums had been divided by themselves.
                b_max = tl.load(lse + o_pair, mask=queries[2], other=float("-inf"))
                b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
                b_out = tile.load_rows(out, o_pair, queries[2], v)
                for i_keys in range(i_first, i_stop):
                    b_out, b_sum, b_max = attention.forward_step(
                        b_q, b_out, b_sum, b_max, k, v, plan, queries, i_keys, i_kv_head, scale, partial, BLOCK_K, True
                    )
                # All threads have read the rows before one writes them; loaded anew, as addresses take many registers.
                tl.debug_barrier()
                queries, o_pair = _queries(plan, o_start, o_nth, count, BLOCK_Q)
                b_out, b_lse = attention.normalize(b_out, b_sum, b_max, queries[2])
                tile.store_rows(out, b_out, o_pair, queries[2], v)
                tl.store(lse + o_pair, b_lse, mask=queries[2])


@triton.jit
def gathered_dq_kernel(
    q, k, v, dout, base, delta, dq, plan, scale, dscale, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Add to dq, float32 `[T, Hq, D]`. dscale: the scale without log2(e)."""
    i_begin, i_end, i_chunk, i_kv_head = _program(plan)
    for i_nth in range(i_begin, i_end):
        p_block = plan.blocks + 5 * i_nth
        o_start, count = _list(plan, tl.load(p_block), i_kv_head, i_chunk)
        for o_nth in range(0, count, BLOCK_Q):
            queries, o_pair = _queries(plan, o_start, o_nth, count, BLOCK_Q)
            some, partial = _sees(plan, queries, p_block + 3)
            if some:
                i_first, i_stop = tl.load(p_block + 1), tl.load(p_block + 2)
                o_row, o_head, m_row = queries
                # [BLOCK_Q, padded D], [BLOCK_Q, padded Dv]
                b_q, b_dout = tile.load_queries(q, queries), tile.load_queries(dout, queries)
                o_statistic = o_head.to(tl.int64) * plan.num_queries + o_row
                b_base = tl.load(base + o_statistic, mask=m_row, other=float("inf"))
                b_delta = tl.load(delta + o_statistic, mask=m_row, other=0.0)
                # The rows may be those that other threads wrote in the last tile.
                tl.debug_barrier()
                # The sum goes on in registers that it needs anyway; it is scaled in memory, and not here.
                b_dq = tile.load_rows(dq, o_pair, m_row, q) * (1.0 / dscale)
                for i_keys in range(i_first, i_stop):
                    b_dq = attention.dq_step(
                        b_dq, b_q, b_dout, b_base, b_delta, k, v, plan, queries, i_keys, i_kv_head, scale, partial,
                        BLOCK_K, True,
                    )  # fmt: skip
                # All threads have read the rows before one writes them; loaded anew, as addresses take many registers.
                tl.debug_barrier()
                queries, o_pair = _queries(plan, o_start, o_nth, count, BLOCK_Q)
                tile.store_rows(dq, b_dq * dscale, o_pair, queries[2], q)


@triton.jit
def gathered_dkv_kernel(
    q, k, v, dout, base, delta, dk, dv, plan, scale, dscale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Write dk `[S, Hk, D]`, dv `[S, Hk, Dv]` or both, float32, of the keys that are in a block."""
    # Earlier blocks, which more rows see, start first.
    i_tile, i_kv_head = tl.program_id(0) // plan.kv_heads, tl.program_id(0) % plan.kv_heads
    p_tile = plan.tiles + 3 * i_tile
    i_block = tl.load(p_tile)
    if i_block >= 0:
        # The parts of all chunks lie one after another.
        p_list = plan.starts + (i_block.to(tl.int64) * plan.kv_heads + i_kv_head) * plan.num_chunks
        o_start = tl.load(p_list)
        count = (tl.load(p_list + plan.num_chunks) - o_start).to(tl.int32)
        keys = tile.tile_rows(plan.k_index, i_tile, plan.num_keys, BLOCK_K)
        # [BLOCK_K, padded D], [BLOCK_K, padded Dv]
        b_k = tile.load_keys(k, plan, i_tile, i_kv_head, BLOCK_K, True)
        b_v = tile.load_keys(v, plan, i_tile, i_kv_head, BLOCK_K, True)
        b_dk = tl.zeros([BLOCK_K, k.padded], tl.float32)
        b_dv = tl.zeros([BLOCK_K, v.padded], tl.float32)
        for o_nth in range(0, count, BLOCK_Q):
            queries, _ = _queries(plan, o_start, o_nth, count, BLOCK_Q)
            _, partial = _sees(plan, queries, p_tile + 1)
            b_dk, b_dv = attention.dkv_step(
                b_dk, b_dv, b_k, b_v, q, dout, base, delta, plan, queries, keys, i_kv_head, scale, partial,
                FOR_K, FOR_V,
            )  # fmt: skip
        attention.store_gradients(dk, b_dk * dscale, dv, b_dv, plan, keys, i_kv_head, k, v, FOR_K, FOR_V)

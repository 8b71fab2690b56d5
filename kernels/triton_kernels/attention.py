# pyright: reportMissingImports=false
"""Flash attention kernels (arXiv 2205.14135, 2307.08691) over tile lists.

A tile of queries is consecutive rows of one head, or GATHERED: rows of any heads of one KV head, named by row * HEADS +
head, whose results go to slots, one for each place of each tile. Scores are scaled inside the exponent, base 2.
"""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels.tile import (
    LN2,
    LOG2E,
    advance,
    load_keys,
    load_queries,
    open_list,
    places,
    query_places,
    result_places,
    visible,
)


@triton.jit
def _own(lists, num_tiles, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GATHERED: tl.constexpr):
    """Return (tile, query head, KV head, list) of this program of a query-stationary kernel."""
    program = tl.program_id(0)
    if GATHERED:
        tile = tl.load(lists.order + program)
        head = 0
        kv_head = tl.load(lists.group + tile)
        number = tile
    else:
        # Heads that share keys run side by side, so that these are read from memory once.
        share: tl.constexpr = HEADS // KV_HEADS
        tile = tl.load(lists.order + program // share % num_tiles)
        kv_head = program // share // num_tiles
        head = kv_head * share + program % share
        number = tl.load(lists.group + head) * num_tiles + tile
    return tile, head, kv_head, number


@triton.jit
def _attend(
    acc, total, top, query, k, v, k_index, terms, lists, number, row, head, there, kv_head, num_queries, num_keys,
    scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Attend to all tiles of half a list; `top` is the greatest scaled score, base 2, -inf if none was seen."""
    visits, at, tile, left = open_list(lists, 2 * number + PARTIAL)
    for _ in range(0, visits):
        key = load_keys(k, k_index, tile, kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, PARTIAL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if PARTIAL:
            place, key_there = places(k_index, tile, num_keys, BLOCK_K)
            seen = visible(
                terms, row[:, None], head[:, None], there[:, None], place[None, :], key_there[None, :], kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, where -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top) if PARTIAL else new_top
        probability = tl.math.exp2(scores * scale - base[:, None])
        rescale = tl.math.exp2(top - base)
        total = total * rescale + tl.sum(probability, 1)
        value = load_keys(v, k_index, tile, kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, PARTIAL)
        acc = tl.dot(probability.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        top = new_top
        at, tile, left = advance(lists, at, tile, left)
    return acc, total, top


@triton.jit
def forward_kernel(
    q, k, v, out, lse, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """Write out and lse, float32: `[T, HEADS, VALUE_DIM]` and `[T, HEADS]`, or of slots. scale: times log2(e)."""
    tile, head, kv_head, number = _own(lists, num_tiles, HEADS, KV_HEADS, GATHERED)
    row, heads, there = query_places(q_index, tile, head, num_queries, BLOCK_Q, HEADS, GATHERED)
    query = load_queries(q, row, heads, there, HEAD_DIM, PADDED_DIM)
    acc = tl.zeros([BLOCK_Q, PADDED_VALUE], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for partial in tl.static_range(2):
        acc, total, top = _attend(
            acc, total, top, query, k, v, k_index, terms, lists, number, row, heads, there, kv_head, num_queries,
            num_keys, scale, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_K, partial,
        )  # fmt: skip
    # Full visits do not ask whether a row is padding.
    real = tl.load(terms.q_document + row, mask=there, other=-1) >= 0
    sees = real & (total > 0)
    result = tl.where(sees[:, None], acc / tl.where(sees, total, 1.0)[:, None], 0.0)
    log_sum = tl.where(sees, (top + tl.math.log2(tl.where(sees, total, 1.0))) * LN2, float("-inf"))
    slot = result_places(tile, row, heads, BLOCK_Q, HEADS, GATHERED)
    column = tl.arange(0, PADDED_VALUE)
    mask = there[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out + slot[:, None] * VALUE_DIM + column[None, :], result, mask=mask)
    tl.store(lse + slot, log_sum, mask=there)


@triton.jit
def delta_kernel(
    dout, out, lse, delta, base, q_document, num_queries,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write delta = rowsum(dout * out) and base = lse * log2(e), float32 `[HEADS, T]`.

    Rows that see nothing have base inf instead of -inf: exp2(score - inf) is the 0 that their gradients need.
    """
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS * BLOCK + tl.arange(0, BLOCK)
    heads = tl.zeros_like(row) + head
    there = row < num_queries
    product = load_queries(dout, row, heads, there, VALUE_DIM, PADDED_VALUE).to(tl.float32)
    product *= load_queries(out, row, heads, there, VALUE_DIM, PADDED_VALUE).to(tl.float32)
    log_sum = tl.load(lse + row.to(tl.int64) * HEADS + head, mask=there, other=0.0).to(tl.float32)
    real = tl.load(q_document + row, mask=there, other=-1) >= 0
    sees = real & (log_sum > float("-inf"))
    to = head.to(tl.int64) * num_queries + row
    tl.store(delta + to, tl.sum(product, 1), mask=there)
    tl.store(base + to, tl.where(sees, log_sum * LOG2E, float("inf")), mask=there)


@triton.jit
def _gather_dq(
    dq, query, dout, base, delta, k, v, k_index, terms, lists, number, row, head, there, kv_head, num_queries, num_keys,
    scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    visits, at, tile, left = open_list(lists, 2 * number + PARTIAL)
    for _ in range(0, visits):
        key = load_keys(k, k_index, tile, kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, PARTIAL)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        probability = tl.math.exp2(scores * scale - base[:, None])
        if PARTIAL:
            place, key_there = places(k_index, tile, num_keys, BLOCK_K)
            seen = visible(
                terms, row[:, None], head[:, None], there[:, None], place[None, :], key_there[None, :], kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            probability = tl.where(seen, probability, 0.0)
        value = load_keys(v, k_index, tile, kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, PARTIAL)
        dprobability = tl.dot(dout, tl.trans(value), input_precision="ieee")
        dscores = probability * (dprobability - delta[:, None])
        dq = tl.dot(dscores.to(key.dtype), key, dq, input_precision="ieee")
        at, tile, left = advance(lists, at, tile, left)
    return dq


@triton.jit
def dq_kernel(
    q, k, v, dout, base, delta, dq, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale, dscale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """Write dq, float32: `[T, HEADS, HEAD_DIM]`, or of slots. dscale: the scale without log2(e)."""
    tile, head, kv_head, number = _own(lists, num_tiles, HEADS, KV_HEADS, GATHERED)
    row, heads, there = query_places(q_index, tile, head, num_queries, BLOCK_Q, HEADS, GATHERED)
    query = load_queries(q, row, heads, there, HEAD_DIM, PADDED_DIM)
    dresult = load_queries(dout, row, heads, there, VALUE_DIM, PADDED_VALUE)
    of_row = heads.to(tl.int64) * num_queries + row
    my_base = tl.load(base + of_row, mask=there, other=float("inf"))
    my_delta = tl.load(delta + of_row, mask=there, other=0.0)
    acc = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    for partial in tl.static_range(2):
        acc = _gather_dq(
            acc, query, dresult, my_base, my_delta, k, v, k_index, terms, lists, number, row, heads, there, kv_head,
            num_queries, num_keys, scale, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_K,
            partial,
        )  # fmt: skip
    slot = result_places(tile, row, heads, BLOCK_Q, HEADS, GATHERED)
    column = tl.arange(0, PADDED_DIM)
    mask = there[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dq + slot[:, None] * HEAD_DIM + column[None, :], acc * dscale, mask=mask)


@triton.jit
def _gather_dkv(
    dk, dv, key, value, q, dout, base, delta, q_index, terms, lists, number, place, key_there, head, kv_head,
    num_queries, num_keys, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, GATHERED: tl.constexpr,
    FOR_K: tl.constexpr, FOR_V: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Scores are held transposed, [keys, queries]: so they are the left operand of both sums without another layout."""
    visits, at, tile, left = open_list(lists, 2 * number + PARTIAL)
    for _ in range(0, visits):
        row, heads, there = query_places(q_index, tile, head, num_queries, BLOCK_Q, HEADS, GATHERED)
        query = load_queries(q, row, heads, there, HEAD_DIM, PADDED_DIM)
        of_row = heads.to(tl.int64) * num_queries + row
        my_base = tl.load(base + of_row, mask=there, other=float("inf"))
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        probability = tl.math.exp2(scores * scale - my_base[None, :])
        if PARTIAL:
            seen = visible(
                terms, row[None, :], heads[None, :], there[None, :], place[:, None], key_there[:, None], kv_head,
                num_queries, num_keys,
            )  # fmt: skip
            probability = tl.where(seen, probability, 0.0)
        dresult = load_queries(dout, row, heads, there, VALUE_DIM, PADDED_VALUE)
        if FOR_V:
            dv = tl.dot(probability.to(dresult.dtype), dresult, dv, input_precision="ieee")
        if FOR_K:
            my_delta = tl.load(delta + of_row, mask=there, other=0.0)
            dprobability = tl.dot(value, tl.trans(dresult), input_precision="ieee")
            dscores = probability * (dprobability - my_delta[None, :])
            dk = tl.dot(dscores.to(query.dtype), query, dk, input_precision="ieee")
        at, tile, left = advance(lists, at, tile, left)
    return dk, dv


@triton.jit
def dkv_kernel(
    q, k, v, dout, base, delta, dk, dv, q_index, k_index, terms, lists, num_queries, num_keys, num_tiles, scale, dscale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PADDED_VALUE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GATHERED: tl.constexpr, FOR_K: tl.constexpr, FOR_V: tl.constexpr,
):  # fmt: skip
    """Write dk `[S, KV_HEADS, HEAD_DIM]`, dv `[S, KV_HEADS, VALUE_DIM]` or both, float32; gathered queries add."""
    program = tl.program_id(0)
    tile = tl.load(lists.order + program % num_tiles)
    kv_head = program // num_tiles
    place, key_there = places(k_index, tile, num_keys, BLOCK_K)
    key = load_keys(k, k_index, tile, kv_head, num_keys, BLOCK_K, HEAD_DIM, PADDED_DIM, True)
    value = load_keys(v, k_index, tile, kv_head, num_keys, BLOCK_K, VALUE_DIM, PADDED_VALUE, True)
    acc_k = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    acc_v = tl.zeros([BLOCK_K, PADDED_VALUE], tl.float32)
    # Gathered queries of all heads of the group are on one list.
    share: tl.constexpr = 1 if GATHERED else HEADS // KV_HEADS
    for nth in range(0, share):
        head = kv_head * share + nth
        number = tl.load(lists.group + head) * num_tiles + tile
        for partial in tl.static_range(2):
            acc_k, acc_v = _gather_dkv(
                acc_k, acc_v, key, value, q, dout, base, delta, q_index, terms, lists, number, place, key_there, head,
                kv_head, num_queries, num_keys, scale, HEADS, HEAD_DIM, VALUE_DIM, PADDED_DIM, PADDED_VALUE, BLOCK_Q,
                GATHERED, FOR_K, FOR_V, partial,
            )  # fmt: skip
    slot = place.to(tl.int64) * KV_HEADS + kv_head
    if FOR_K:
        _store_keys(dk, acc_k * dscale, slot, key_there, HEAD_DIM, PADDED_DIM, GATHERED)
    if FOR_V:
        _store_keys(dv, acc_v, slot, key_there, VALUE_DIM, PADDED_VALUE, GATHERED)


@triton.jit
def _store_keys(to, rows, slot, there, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    """Write, or add, rows `[BLOCK, PADDED]` to float32 slots of WIDTH; no other program has a part in these."""
    column = tl.arange(0, PADDED)
    pointers = to + slot[:, None] * WIDTH + column[None, :]
    mask = there[:, None] & (column < WIDTH)[None, :]
    if ADD:
        # To load what is there would take as many registers as the rows have, and spill these.
        tl.atomic_add(pointers, rows, mask=mask, sem="relaxed")
    else:
        tl.store(pointers, rows, mask=mask)


@triton.jit
def combine_kernel(
    part, part_lse, out, lse, slot_offsets, slots, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Merge the slots of each row of each head into float32 `[rows * heads, WIDTH]`, in the order of `slots`.

    With part_lse: partial results of attention, weighted by log-sum-exp, and lse `[rows * heads]` is written too.
    Without: summands.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < count
    column = tl.arange(0, PADDED)
    wide = (column < WIDTH)[None, :]
    start = tl.load(slot_offsets + row, mask=there, other=0)
    number = tl.load(slot_offsets + row + 1, mask=there, other=0) - start
    acc = tl.zeros([BLOCK, PADDED], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for nth in range(0, tl.max(number, 0)):
        mine = nth < number
        slot = tl.load(slots + start + nth, mask=mine, other=0).to(tl.int64)
        term = tl.load(part + slot[:, None] * WIDTH + column[None, :], mask=mine[:, None] & wide, other=0.0)
        if part_lse is None:
            acc += term
        else:
            log_sum = tl.load(part_lse + slot, mask=mine, other=float("-inf"))
            new_top = tl.maximum(top, log_sum)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            rescale, weight = tl.exp(top - base), tl.exp(log_sum - base)
            total = total * rescale + weight
            acc = acc * rescale[:, None] + term * weight[:, None]
            top = new_top
    if part_lse is not None:
        sees = total > 0
        divisor = tl.where(sees, total, 1.0)
        acc = acc / divisor[:, None]
        tl.store(lse + row, tl.where(sees, top + tl.log(divisor), float("-inf")), mask=there)
    tl.store(out + row[:, None] * WIDTH + column[None, :], acc, mask=there[:, None] & wide)

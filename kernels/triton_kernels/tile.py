# pyright: reportMissingImports=false
# ruff: noqa: SIM108 - the branch that is not taken is not compiled either
"""What the attention kernels do with a tile: walk a list, load rows, evaluate the predicate."""

import triton
import triton.language as tl

from farspan.kernels.triton_kernels import block_mask as tile_lists

COUNT_BITS = tl.constexpr(tile_lists.COUNT_BITS)
MAX_COUNT = tl.constexpr(tile_lists.MAX_COUNT)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def open_list(lists, number):
    """Return (number of visits, place of the entry, its first tile, tiles left in it) of one half of a list."""
    at = tl.load(lists.offsets + number)
    entry = tl.load(lists.entries + at)
    return tl.load(lists.visits + number), at, entry >> COUNT_BITS, entry & MAX_COUNT


@triton.jit
def advance(lists, at, tile, left):
    """Return the same after one visit; a flat loop over tiles, not over entries, is what gets pipelined."""
    ended = left == 1
    at += ended.to(tl.int32)
    entry = tl.load(lists.entries + at)
    return at, tl.where(ended, entry >> COUNT_BITS, tile + 1), tl.where(ended, entry & MAX_COUNT, left - 1)


@triton.jit
def places(index, tile, count, BLOCK: tl.constexpr):
    """Return the rows of a tile `[BLOCK]` and whether there are such rows; absent ones are row 0."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    if index is None:
        there = row < count
    else:
        row = tl.load(index + row)
        there = row >= 0
    return tl.where(there, row, 0), there


@triton.jit
def query_places(index, tile, head, count, BLOCK: tl.constexpr, HEADS: tl.constexpr, GATHERED: tl.constexpr):
    """Return rows and heads of a tile of queries `[BLOCK]`, and whether they are there; gathered rows bring heads."""
    row, there = places(index, tile, count, BLOCK)
    if GATHERED:
        heads = row % HEADS
        row = row // HEADS
    else:
        heads = tl.zeros_like(row) + head
    return row, heads, there


@triton.jit
def result_places(tile, row, head, BLOCK: tl.constexpr, HEADS: tl.constexpr, GATHERED: tl.constexpr):
    """Return where results of a tile of queries go, int64 `[BLOCK]`: to slots of their own, or to row and head."""
    if GATHERED:
        place = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        place = row.to(tl.int64) * HEADS + head
    return place


@triton.jit
def load_queries(x, row, head, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Return rows of an operand `[BLOCK, PADDED]`, 0 where there is none."""
    column = tl.arange(0, PADDED)
    start = row.to(tl.int64) * x.row + head.to(tl.int64) * x.head
    mask = there[:, None]
    if PADDED != WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(x.pointer + start[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(
    x, index, tile, head, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SHORT: tl.constexpr
):
    """Return a tile of rows of an operand `[BLOCK, PADDED]`; only a SHORT tile may lack rows, which are 0."""
    column = tl.arange(0, PADDED)
    base = x.pointer + tl.cast(head, tl.int64) * x.head
    if index is None:
        nth = tl.arange(0, BLOCK)
        there = tile * BLOCK + nth < count
        pointers = base + tl.cast(tile * BLOCK, tl.int64) * x.row + (nth[:, None] * x.row + column[None, :])
    else:
        row, there = places(index, tile, count, BLOCK)
        pointers = base + (row.to(tl.int64) * x.row)[:, None] + column[None, :]
    if SHORT:
        loaded = tl.load(pointers, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif PADDED != WIDTH:
        loaded = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def visible(terms, row, head, there, key, key_there, kv_head, num_queries, num_keys):
    """Return which queries see which keys: row, head, there of queries and key, key_there broadcast together."""
    # Absent keys and padding have rank -1, absent queries and padding end at -1.
    rank = tl.load(terms.k_rank + key, mask=key_there, other=-1)
    of_window = tl.load(terms.window + head).to(tl.int64) * num_queries + row
    seen = rank <= tl.load(terms.q_last + of_window, mask=there, other=-1)
    seen &= rank >= tl.load(terms.q_first + of_window, mask=there, other=0)
    if terms.q_first_sink is not None:
        is_sink = rank <= tl.load(terms.q_last_sink + row, mask=there, other=-1)
        is_sink &= rank >= tl.load(terms.q_first_sink + row, mask=there, other=0)
        seen |= is_sink
    if terms.lifetime is not None:
        lifetime = terms.lifetime + tl.cast(kv_head, tl.int64) * num_keys
        q_position = tl.load(terms.q_position + row, mask=there, other=0)
        seen &= q_position <= tl.load(lifetime + key, mask=key_there, other=-1)
    if terms.k_place is not None:
        # Each guard survives where place - low, or high - place, takes nothing from it.
        place = tl.load(terms.k_place + key, mask=key_there, other=0)
        above = (place | terms.guards) - tl.load(terms.q_low + row, mask=there, other=0)
        below = tl.load(terms.q_high + row, mask=there, other=0) - place
        seen &= (above & below & terms.guards) == terms.guards
    if terms.k_class is not None:
        q_class = tl.load(terms.q_class + row, mask=there, other=0)
        seen &= q_class == tl.load(terms.k_class + key, mask=key_there, other=-1)
    return seen

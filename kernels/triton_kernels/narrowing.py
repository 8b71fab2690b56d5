# pyright: reportMissingImports=false
"""Narrow the lists of a mask to what is known on the device only: blocks that queries select, or lifetimes of keys.

One program walks one list of the mask, CHUNK tiles at a time, and writes those that remain one after another, each a
run of its own. Example: a query tile whose list by the mask is tiles 0 to 4, the last of them partial; it selects the
blocks of tiles 1, 2 and 4:

    bit      0 1 1 0 | 1
    place    - 0 1 - | 2        the bits so far: each tile knows its place without the others
    runs     (1, 1) (2, 1) (4, 1)        two full ones, then a partial one
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.triton_kernels.tile import COUNT_BITS, MAX_COUNT


class Selected(NamedTuple):
    """Bits of a packed selection, int32 `[Q, heads, words]`; the query block and key block of each tile, -1 for none.

    query_block: int32 `[query tiles]`. key_block: int32 `[key tiles]`.
    """

    bits: Tensor
    query_block: Tensor
    key_block: Tensor
    heads: int
    words: int


class Alive(NamedTuple):
    """Least and greatest lifetime of the keys of a tile, int32 `[Hk, key tiles]`, and position of a tile's queries.

    query_low, query_high: int64 `[query tiles]`; of a tile of padding the least exceeds every lifetime.
    """

    low: Tensor
    high: Tensor
    query_low: Tensor
    query_high: Tensor
    key_tiles: int


class Portion(NamedTuple):
    """Tiles whose lists are made at once: `order` int32 `[n]`, and where the runs of each list go.

    start: int32 `[groups * n]`. part, source: int32 `[groups]`, the group of the mask's lists that a group narrows, and
    the head of the selection, or the KV head, by which it does.
    """

    order: Tensor
    start: Tensor
    part: Tensor
    source: Tensor
    tiles: int


@triton.jit
def narrow_kernel(
    mask, portion, selected, alive, offsets, counts, runs, num_tiles, BY_QUERIES: tl.constexpr, CHUNK: tl.constexpr
):
    """Write offsets, counts and runs of a block mask, of the lists of some tiles; `mask` is the block mask to narrow.

    Either `selected` or `alive` is None.
    """
    i_program = tl.program_id(0)
    i_group = i_program // portion.tiles
    i_tile = tl.load(portion.order + i_program % portion.tiles)
    i_source = tl.load(portion.source + i_group)
    i_list = i_group * num_tiles + i_tile
    i_mask_list = tl.load(portion.part + i_group) * num_tiles + i_tile
    # A list has room for all tiles of the mask's, so that no list waits for another.
    o_run = tl.load(portion.start + i_program)
    for partial in tl.static_range(2):
        o_first = o_run
        for was_partial in tl.static_range(2):
            # What is full by the mask may be partial by lifetimes, not by a selection; what is partial stays partial.
            if was_partial == partial or (partial and alive is not None):
                for o_mask_run in range(
                    tl.load(mask.offsets + 2 * i_mask_list + was_partial),
                    tl.load(mask.offsets + 2 * i_mask_list + was_partial + 1),
                ):
                    run = tl.load(mask.runs + o_mask_run)
                    i_stop = (run >> COUNT_BITS) + (run & MAX_COUNT)
                    for i_first in range(run >> COUNT_BITS, i_stop, CHUNK):
                        o_tile = i_first + tl.arange(0, CHUNK)
                        m_tile = o_tile < i_stop
                        o_query = tl.zeros_like(o_tile) + i_tile
                        o_key = o_tile
                        if not BY_QUERIES:
                            o_query, o_key = o_key, o_query
                        if selected is not None:
                            m_visit = _is_selected(selected, i_source, o_query, o_key, m_tile)
                        else:
                            m_visit = _is_alive(alive, i_source, o_query, o_key, m_tile, was_partial, partial)
                        b_visit = m_visit.to(tl.int32)
                        o_place = o_run + tl.cumsum(b_visit, 0) - 1
                        tl.store(runs + o_place, o_tile << COUNT_BITS | 1, mask=m_visit)
                        o_run += tl.sum(b_visit, 0)
        tl.store(offsets + 2 * i_list + partial, o_first)
        tl.store(counts + 2 * i_list + partial, o_run - o_first)


@triton.jit
def _is_selected(selected, i_head, o_query, o_key, m_tile):
    """Return which pairs of tiles `[CHUNK]` are of a query block that selects the key block."""
    b_query = tl.load(selected.query_block + o_query, mask=m_tile, other=-1)
    b_key = tl.load(selected.key_block + o_key, mask=m_tile, other=-1)
    m_block = (b_query >= 0) & (b_key >= 0)
    # int64: query blocks x heads x words may exceed 2^31.
    o_word = (b_query.to(tl.int64) * selected.heads + i_head) * selected.words + b_key // 32
    b_word = tl.load(selected.bits + o_word, mask=m_block, other=0)
    return m_block & (((b_word >> (b_key & 31)) & 1) != 0)


@triton.jit
def _is_alive(alive, i_head, o_query, o_key, m_tile, was_partial: tl.constexpr, partial: tl.constexpr):
    """Return in which pairs of tiles `[CHUNK]` some key may live for some query, and all for all or not, as asked."""
    o_life = i_head.to(tl.int64) * alive.key_tiles + o_key
    b_first = tl.load(alive.query_low + o_query, mask=m_tile, other=0)
    m_alive = m_tile & (b_first <= tl.load(alive.high + o_life, mask=m_tile, other=-1))
    if not was_partial:
        b_last = tl.load(alive.query_high + o_query, mask=m_tile, other=0)
        m_all = b_last <= tl.load(alive.low + o_life, mask=m_tile, other=-1)
        m_alive = m_alive & ~m_all if partial else m_alive & m_all
    return m_alive

# pyright: reportMissingImports=false
"""Launches of attention where single rows select key blocks: from the bits of a selection on its device to gradients.

Everything that depends on content is made on the device, of a size that the host knows ahead: nobody waits. One
ordering serves the forward pass, dk and dv, dq, and all parts of the keys; what depends on rows and mask alone is
copied once per sequence.

Legend: T queries, S keys, Hq query heads, Hk KV heads, D head size, Dv value head size.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.merge import empty_partial
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import gathered as kernels
from farspan.kernels.triton_kernels import row_lists
from farspan.kernels.triton_kernels.attention_launch import LOG2E, Shape, Shapes, launch, options, shapes_in, statistics
from farspan.kernels.triton_kernels.mask_terms import MaskTerms, of_queries
from farspan.kernels.triton_kernels.row_tables import RowTables, static_terms
from farspan.kernels.triton_kernels.tile import Operand
from farspan.kernels.triton_kernels.tile_lists import packed

LN2 = 0.6931471805599453
LIST_ROWS = 256
"""Rows of heads of one chunk that select a block, on average: some tiles, so that the last, short one weighs little."""
PROGRAMS = 512
"""Programs of a kernel of queries, at least: two for each that an H100 runs at the same time."""
SHORTEST_CHUNK = 16
ORDERED_AT_ONCE = 128
"""Rows of heads in a step of the kernels that order them."""

# Tiles of 64 rows: lists of a chunk are short, and groups of 4 warps, two of which share a processor, hide from each
# other the loads of the rows that are gathered; where out or dq of wide heads come from memory while as many registers
# wait for them, 8 warps. Compiled for an H100 as the shapes of attention_launch.py; no timings yet.
_HALF = {
    (64, 64): Shapes(forward=Shape(64, 64, 4, 3), dq=Shape(64, 64, 4, 3), dkv=Shape(64, 128, 8, 3)),
    (128, 128): Shapes(forward=Shape(64, 64, 4, 3), dq=Shape(64, 64, 4, 3), dkv=Shape(32, 128, 8, 3)),
    (256, 128): Shapes(forward=Shape(64, 64, 4, 3), dq=Shape(64, 32, 8, 3), dkv=Shape(32, 128, 8, 3), dkv_in_turn=True),
    (256, 256): Shapes(forward=Shape(64, 32, 8, 3), dq=Shape(64, 32, 8, 3), dkv=Shape(16, 128, 8, 3), dkv_in_turn=True),
}


def shapes_for(width: int, value_width: int, dtype: torch.dtype) -> Shapes:
    """Return the shapes for head sizes of queries and keys, and of values."""
    return shapes_in(_HALF, width, value_width, dtype)


class GatheredPlan(NamedTuple):
    """A plan as the kernels take it: its mask, the tables of its keys, and the lists of rows; see `RowTables`.

    num_visited: blocks with keys. num_blocks: of the whole sequence. constexpr: heads, kv_heads.
    """

    terms: MaskTerms
    k_index: Tensor | None
    blocks: Tensor
    visits: Tensor
    tiles: Tensor
    members: Tensor
    starts: Tensor
    num_queries: int
    num_keys: int
    num_chunks: int
    heads: Any
    kv_heads: Any


def prepare(plan: Plan, spec: InputSpec) -> None:
    """Make what both passes of a plan find on the device, whatever its selection and, if drawn, its queries."""
    shapes = shapes_for(spec.head_dim, spec.value_dim, spec.dtype)
    if plan.drawn_from is None:
        selection = packed(plan, spec.device)
        prepare_lists(plan, spec.device)
        source, chunk = plan, _chunk_rows(selection, plan.heads, spec.kv_heads)
    else:
        selection, source = plan.selection, plan.drawn_from[0]
        assert selection is not None
        chunk = len(source.queries)
    _terms(source, spec.device)
    for shape in (shapes.forward, shapes.dkv, shapes.dq):
        _tables(source, selection.blocks, shape.keys, chunk, spec.device)


def prepare_lists(plan: Plan, device: torch.device) -> None:
    """Make what the lists of selections such as the plan's need on `device`."""
    _query_block(plan, packed(plan, device), device)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]` and lse `[T, Hq]`, float32, of q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]`."""
    shape, scale = shapes_for(q.shape[2], v.shape[2], q.dtype).forward, q.shape[2] ** -0.5
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    gathered = _gathered_plan(q, k, plan, shape)
    launch(
        kernels.gathered_forward_kernel, gathered.num_chunks * k.shape[1], *(Operand.of(x) for x in (q, k, v)),
        out, lse, gathered, scale * LOG2E, **options(shape),
    )  # fmt: skip
    # In base 2 as long as rows go back and forth between registers and memory.
    return out, lse.mul_(LN2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    shapes, scale = shapes_for(q.shape[2], v.shape[2], q.dtype), q.shape[2] ** -0.5
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = statistics(dout, out, lse, _terms(plan, q.device))
    # Both operands of a product have one dtype.
    given = *(Operand.of(x) for x in (q, k, v, dout.to(q.dtype))), base, delta
    gathered = _gathered_plan(q, k, plan, shapes.dkv)
    for sums in shapes.key_sums:
        launch(
            kernels.gathered_dkv_kernel, len(gathered.tiles) * k.shape[1], *given, dk, dv, gathered, scale * LOG2E,
            scale, **options(shapes.dkv), **sums,
        )  # fmt: skip
    gathered = _gathered_plan(q, k, plan, shapes.dq)
    launch(
        kernels.gathered_dq_kernel, gathered.num_chunks * k.shape[1], *given, dq, gathered, scale * LOG2E, scale,
        **options(shapes.dq),
    )  # fmt: skip
    return dq, dk, dv


def _gathered_plan(q: Tensor, k: Tensor, plan: Plan, shape: Shape) -> GatheredPlan:
    device, drawn = q.device, plan.drawn_from
    selection = packed(plan, device) if drawn is None else plan.selection
    assert selection is not None
    lists = row_lists_of(selection, plan, kv_heads=k.shape[1])
    # Which of the source's queries a chunk has, the host does not know: it visits all blocks that any of them may see.
    source, chunk = (plan, lists.chunk_rows) if drawn is None else (drawn[0], len(drawn[0].queries))
    tables = _tables(source, selection.blocks, shape.keys, chunk, device)
    visits = tables.visits if drawn is None else tables.visits.repeat(lists.num_chunks, 1)
    return GatheredPlan(
        _terms(plan, device), tables.k_index, tables.blocks, visits, tables.tiles, lists.members, lists.starts,
        len(q), len(k), lists.num_chunks, tl.constexpr(q.shape[1]), tl.constexpr(k.shape[1]),
    )  # fmt: skip


def choices(plan: Plan, kv_heads: int) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.backend.Backend.choices`; the lists are those of the attention that follows."""
    assert isinstance(plan.selection, PackedSelection)
    lists = row_lists_of(plan.selection, plan, kv_heads=kv_heads)
    # [blocks * Hk * chunks + 1] -> [blocks + 1]
    starts = lists.starts[:: kv_heads * lists.num_chunks].contiguous()
    place = torch.arange(len(lists.members), device=starts.device)
    # Members behind the last list are undefined.
    block = torch.searchsorted(starts, place, right=True) - 1
    return lists.members.long().masked_fill_(block == len(starts) - 1, 0), block


# What rows and mask alone decide: made and copied once per sequence.


def _terms(plan: Plan, device: torch.device) -> MaskTerms:
    if plan.drawn_from is not None:
        source, index = plan.drawn_from
        return once(plan.cache, "terms", lambda: of_queries(_terms(source, device), index))
    on_host = once(plan.shared, ("static terms", torch.device("cpu")), lambda: static_terms(plan))

    def make() -> MaskTerms:
        columns = (copy_to(x, device) if isinstance(x, Tensor) else x for x in on_host)
        return MaskTerms(*columns)  # pyright: ignore[reportArgumentType]

    return once(plan.shared, ("static terms", device), make)


def _tables(plan: Plan, blocks: BlockPartition, size: int, chunk_rows: int, device: torch.device) -> RowTables:
    def make() -> RowTables:
        return RowTables.of(plan, blocks, size, _terms(plan, torch.device("cpu")), chunk_rows).to(device)

    return once(plan.shared, ("row tables", blocks, size, chunk_rows, device), make)


def _query_block(plan: Plan, selection: PackedSelection, device: torch.device) -> Tensor:
    """Return the query block of each row, int32 `[T]`, which layers share."""
    query_block = selection.query_block
    return once(plan.shared, ("query block", query_block, device), lambda: copy_to(query_block.int(), device))


# What a selection decides: made once for each pass of a layer.


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowLists:
    """The rows that select each block, for each KV head; an example is in row_lists.py.

    A row of a head is numbered row * heads + head. members: int32, of a size that no selection exceeds; what follows
    the last list is undefined. starts: int64 `[blocks * Hk * chunks + 1]`. chunk_rows: rows of a chunk.
    """

    members: Tensor
    starts: Tensor
    chunk_rows: int
    num_chunks: int


_LATEST: WeakKeyDictionary[BlockSelection | PackedSelection, tuple[int, RowLists]] = WeakKeyDictionary()
"""Of one selection at a time: a pass that recomputes orders its rows again, by the bits that wait for it.

Bits are 4 bytes x Hq x ceil(blocks / 32) of each token and layer, lists 4 bytes x Hq x `most`: at 131,072 tokens and 32
heads 1 KiB each for 8 blocks of 512, 4 KiB for 32 of 128. Kept for 32 layers, lists would take 4.3 or 17 GB besides.
To order again takes 4 operations, which read the bits twice and write the lists: 0.4 or 1.6 GB, 0.1 or 0.5 ms at 3.35
TB/s, beside 9 TFLOP of attention, 22 ms at 400 TFLOP/s.
"""


def row_lists_of(selection: BlockSelection | PackedSelection, plan: Plan, *, kv_heads: int) -> RowLists:
    """Return the lists of the plan's queries: the same for all parts of the keys, and for both passes in a row.

    A `BlockSelection` is that of drawn queries of one head, whose lists are on the device.
    """
    made_for, lists = _LATEST.get(selection, (0, None))
    if lists is None or made_for != kv_heads:
        _LATEST.clear()
        if isinstance(selection, BlockSelection):
            lists = _sorted_row_lists(selection)
        else:
            lists = _row_lists(selection, _query_block(plan, selection, selection.stored.device), plan.heads, kv_heads)
        _LATEST[selection] = kv_heads, lists
    return lists


def _sorted_row_lists(selection: BlockSelection) -> RowLists:
    """Return the lists of single rows of one head; entries are few, where bits would have a place for every block."""
    rows, blocks, entries = selection.num_query_blocks, selection.blocks.count, len(selection.key_blocks)
    chunk = chunk_rows(rows, 1, 1, blocks, triton.cdiv(entries, rows))
    # One number per entry that sorts by block, then by row.
    number = (selection.key_blocks.long() * rows + selection.lists).sort().values
    first = torch.arange(0, rows, chunk, device=number.device)
    block = torch.arange(0, blocks * rows, rows, device=number.device)
    # [blocks, chunks] -> [blocks * chunks + 1]
    bounds = torch.nn.functional.pad((block[:, None] + first).flatten(), (0, 1), value=blocks * rows)
    return RowLists(
        members=(number % rows).int(),
        starts=torch.searchsorted(number, bounds),
        chunk_rows=chunk,
        num_chunks=len(first),
    )


def _row_lists(selection: PackedSelection, query_block: Tensor, heads: int, kv_heads: int) -> RowLists:
    rows, blocks = len(query_block), selection.blocks.count
    if rows * heads > torch.iinfo(torch.int32).max:
        raise ValueError(f"{rows} rows of {heads} heads are too many to number: split the sequence over more ranks")
    most, chunk = min(selection.most, blocks), _chunk_rows(selection, heads, kv_heads)
    bits = selection.bits
    chunks, words = triton.cdiv(rows, chunk), bits.shape[2]
    members = torch.empty(max(rows * heads * most, 1), dtype=torch.int32, device=query_block.device)
    # One in front, which stays 0: the sums are where lists start.
    counts = torch.zeros(1 + kv_heads * blocks * chunks, dtype=torch.int32, device=query_block.device)
    sizes = rows, blocks, words, chunks, chunk
    constants = {
        "HEADS": heads, "SHARE": heads // kv_heads, "LISTS": selection.heads, "BLOCK": ORDERED_AT_ONCE
    }  # fmt: skip
    programs = words * chunks * kv_heads
    launch(row_lists.histogram_kernel, programs, bits, query_block, counts[1:], *sizes, **constants)
    starts = counts.cumsum(0)
    launch(row_lists.fill_kernel, programs, bits, query_block, starts, members, *sizes, **constants)
    return RowLists(members=members, starts=starts, chunk_rows=chunk, num_chunks=chunks)


def _chunk_rows(selection: PackedSelection, heads: int, kv_heads: int) -> int:
    blocks = selection.blocks.count
    return chunk_rows(len(selection.query_block), heads, kv_heads, blocks, min(selection.most, blocks))


def chunk_rows(rows: int, heads: int, kv_heads: int, blocks: int, most: int) -> int:
    """Return how many rows a program of the kernels of queries has, by what the host knows of a selection."""
    for_lists = LIST_ROWS * blocks * kv_heads // max(heads * most, 1)
    for_programs = rows * kv_heads // PROGRAMS
    # A power of 2: few sizes, and so few tables, where selections bound their lists by what they are.
    return max(1 << min(for_lists, for_programs).bit_length() >> 1, SHORTEST_CHUNK)

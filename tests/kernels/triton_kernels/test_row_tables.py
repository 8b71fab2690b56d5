"""Static tables of gathered rows: they rule blocks out and in as the mask does, and cut the work of a ring by part."""

import numpy as np
import pytest
import torch

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels.block_mask import tile_plan
from farspan.kernels.triton_kernels.row_tables import LACKS_ROWS, RowTables, static_terms
from farspan.parallel.layout import Shards
from tests.support.mechanisms import normal
from tests.support.sequence_shards import select

CHUNK, TILE = 7, 8
ROWS = {
    "ragged": Rows.packed([1, 40, 3, 33], padding=5),
    "shuffled": Rows.packed([50, 30], padding=3).take(torch.randperm(83, generator=torch.Generator().manual_seed(0))),
    "none": Rows.packed([]),
}
MASKS = (
    AttentionMask(),
    AttentionMask(causal=False),
    AttentionMask(window=(9, 30), sinks=2),
    AttentionMask(causal=False, window=20),
)


def tables_of(plan: Plan, blocks: BlockPartition) -> RowTables:
    return RowTables.of(plan, blocks, TILE, static_terms(plan), CHUNK)


@pytest.mark.parametrize("attention_mask", MASKS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_and_tiles_are_ruled_out_and_in_as_by_the_mask(rows: str, attention_mask: AttentionMask) -> None:
    """Of some keys: the first half, in blocks that they do not fill, and of a permutation."""
    for keys, size in ((ROWS["ragged"].slice(slice(0, 41)), 12), (ROWS["shuffled"], 8), (ROWS["none"], 8)):
        queries, blocks = ROWS[rows], BlockPartition.blocks(keys, size)
        plan = Plan.build(queries, keys, attention_mask, heads=2)
        tables, visible = tables_of(plan, blocks), plan.mask().numpy()  # [heads, queries, keys]
        block_of_key = blocks.of(keys).numpy()
        assert sorted(tables.blocks[:, 0].tolist()) == sorted(set(block_of_key.tolist()) - {-1})
        k_index = np.arange(len(keys)) if tables.k_index is None else tables.k_index.numpy()
        for nth, (block, first, stop, low, high) in enumerate(tables.blocks.tolist()):
            members = np.flatnonzero(block_of_key == block)
            held = k_index[first * TILE : stop * TILE]
            held = held[held >= 0]
            assert sorted(held[block_of_key[held] == block]) == members.tolist()
            check_ranks(plan, visible[:, :, members], low, high, lacks_rows=len(members) < (stop - first) * TILE)
            for chunk, (begin, end) in enumerate(tables.visits.tolist()):
                of_chunk = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                assert begin <= nth < end or not visible[:, of_chunk, members].any()
        for tile, (block, low, high) in enumerate(tables.tiles.tolist()):
            members = k_index[tile * TILE : (tile + 1) * TILE]
            members = members[(members >= 0) & (block_of_key[members] >= 0)]
            assert set(block_of_key[members]) == ({block} if block >= 0 else set())
            check_ranks(plan, visible[:, :, members], low, high, lacks_rows=len(members) < TILE)


def check_ranks(plan: Plan, visible: np.ndarray, low: int, high: int, *, lacks_rows: bool) -> None:
    """Compare what the kernels conclude from ranks with the mask `[heads, queries, keys]` of some keys."""
    terms = static_terms(plan)
    for head, window in enumerate(terms.window.tolist()):
        first, last = terms.q_first[window].numpy(), terms.q_last[window].numpy()
        some, full = (first <= high) & (last >= low), (first <= low) & (last >= high)
        if terms.q_first_sink is not None and terms.q_last_sink is not None:
            first, last = terms.q_first_sink.numpy(), terms.q_last_sink.numpy()
            some, full = some | ((first <= high) & (last >= low)), full | ((first <= low) & (last >= high))
        assert not (visible[head].any(axis=1) & ~some).any()
        assert not (full & ~visible[head].all(axis=1)).any()
        # A tile that is full of keys is found to be visible in full where one interval of ranks holds it all.
        if not lacks_rows and not plan.attention_mask.sinks:
            assert (full == visible[head].all(axis=1)).all()
        assert not (lacks_rows and full.any())


def test_tables_follow_blocks_that_interleave() -> None:
    """Even and odd positions: neither block ends before the other, and each has tiles of its own."""
    rows = Rows.packed([64])
    blocks = BlockPartition.build(rows, lambda position: position % 2)
    plan = Plan.build(rows, rows, AttentionMask(window=10), heads=1)
    tables = tables_of(plan, blocks)
    assert tables.blocks.tolist() == [[0, 0, 4, 0, 62], [1, 4, 8, 1, 63]]
    assert (tables.visits == torch.tensor([0, 2])).all()
    assert tables.tiles[:, 0].tolist() == [0] * 4 + [1] * 4


def test_a_block_that_ends_after_later_ones_is_visited_by_late_queries() -> None:
    """Block 0 is both ends of a document, blocks 1 and 2 are between them."""
    rows = Rows.packed([64])
    blocks = BlockPartition.build(rows, lambda x: ((x >= 4) & (x < 60)).long() * (1 + (x >= 31).long()))
    plan = Plan.build(rows, rows, AttentionMask(window=10), heads=1)
    tables = tables_of(plan, blocks)
    assert tables.blocks[:, 3:].tolist() == [[0, 63], [LACKS_ROWS, 30], [LACKS_ROWS, 59]]
    # The queries 63 and 56 to 62 see keys from 54 and 47 on.
    assert tables.visits[-2:].tolist() == [[0, 3], [0, 3]]


@pytest.mark.parametrize(
    ("mechanism", "layout", "lengths"),
    [
        (MoBA(block=16, top_k=4), "zigzag", [4096]),
        (MoBA(block=16, top_k=4), "zigzag", [1000, 96, 2500, 500]),
        (MoBA(block=16, top_k=4), "balanced", [1000, 96, 2500, 500]),
        (VMoBA(brick=(16,), rule="top_k", top_k=4), "zigzag", [4096]),
        (VMoBA(brick=(16,), rule="top_k", top_k=4), "balanced", [1000, 96, 2500, 500]),
    ],
    ids=str,
)
def test_a_rank_of_a_ring_walks_its_share_of_the_choices(mechanism: Routed, layout: str, lengths: list[int]) -> None:
    """Ring 8: the lists that the kernels of queries and of keys walk, over all parts of the keys."""
    degree, heads, rows = 8, 2, Rows.packed(lengths)
    shards = Shards.build(rows, layout=layout, degree=degree, work=mechanism.keys_per_query)
    q, k = normal(*(2 * [(len(rows), heads, 16)]))
    selection = select(mechanism, q, k, rows)
    choices = int(selection.offsets[-1])
    for rank in range(degree):
        mine = shards.index[rank]
        packed = PackedSelection.pack(selection.of_queries(mine), torch.device("cpu"))
        # [rows, heads, blocks] -> [chunks, blocks]
        selects = packed.as_lists.table()[:, packed.query_block, :-1].sum(dim=0)
        of_chunk = np.add.reduceat(selects.numpy(), np.arange(0, len(mine), CHUNK))
        by_queries = by_keys = 0
        for part in shards.index:
            tables = tables_of(
                Plan.build(rows.take(mine), rows.take(part), mechanism.attention_mask(), heads=heads), packed.blocks
            )
            for chunk, (begin, end) in enumerate(tables.visits.tolist()):
                by_queries += int(of_chunk[chunk, tables.blocks[begin:end, 0].numpy()].sum())
            by_keys += int(of_chunk[:, tables.blocks[:, 0].numpy()].sum())
        # Every choice, and but for blocks that lie in two parts none twice.
        assert int(selects.sum()) <= by_queries <= by_keys <= 1.2 * choices / degree


def visits(plan: Plan) -> np.ndarray:
    """Return the pairs of tiles that lists of queries and of keys have by the mask: what a device narrows and walks."""
    found = tile_plan(plan, 128, 64, "queries"), tile_plan(plan, 32, 128, "keys")
    return np.array([int(of.lists.counts.sum()) for of in found])


@pytest.mark.parametrize(
    ("mechanism", "layout"),
    [
        (BlockSparse(block=128), "zigzag"), (BlockSparse(block=128), "balanced"),
        (SpargeAttention(top=0.1), "zigzag"), (SpargeAttention(top=0.1), "balanced"),
        (NAtS(), "zigzag"), (NAtS(), "balanced"), (NAtS(), "striped"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rank_of_a_ring_narrows_its_share_of_the_tiles(mechanism: Masked, layout: str) -> None:
    """Ring 8: all lists that are cut by content, over all parts of the keys."""
    degree, rows = 8, Rows.packed([8192])
    shards = Shards.build(rows, layout=layout, degree=degree, work=mechanism.keys_per_query)

    def plan_of(queries: torch.Tensor, keys: torch.Tensor) -> Plan:
        of = rows.take(queries)
        plan = Plan.build(of, rows.take(keys), mechanism.attention_mask(), heads=2)
        if not isinstance(mechanism, Routed):
            return plan
        query_block, blocks = mechanism.query_blocks(rows).of(of), mechanism.key_blocks(rows)
        bits = torch.empty(mechanism.query_blocks(rows).count, 2, 4, dtype=torch.int32)
        return plan.with_selection(PackedSelection(stored=bits, query_block=query_block, blocks=blocks, most=4))

    every = torch.arange(len(rows))
    of_all = visits(plan_of(every, every))
    for mine in shards.index:
        assert (sum(visits(plan_of(mine, part)) for part in shards.index) <= 1.2 * of_all / degree).all()

"""Every routed mechanism: one selection, however rows and heads are sharded, with the bytes that it states."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds import routed
from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.planner import Heads, HeadShare
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from farspan.kernels.routing.ranking import affinity
from tests.support.mechanisms import examples, normal
from tests.support.sequence_shards import lists, select, select_on_ranks

EXAMPLES = examples(Routed)
ROWS = Rows.packed([130, 1, 75, 40], padding=9)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return normal((len(ROWS), 4, 16), (len(ROWS), 2, 16), dtype=dtype)


def by_row(selection: BlockSelection, rows: Tensor, heads: range = range(4)) -> dict[tuple[int, int], list[int]]:
    """The blocks of each (query head, row of the sequence), of a selection for some heads and rows."""
    of_block, group = lists(selection), len(heads) // selection.heads
    return {
        (head, row): of_block[number // group, block]
        for number, head in enumerate(heads)
        for row, block in zip(rows.tolist(), selection.query_block.tolist(), strict=True)
        if block >= 0
    }


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
@pytest.mark.parametrize("shards", ["striped", "contiguous", "shuffled"])
def test_the_selection_does_not_depend_on_the_shards(mechanism: Routed, shards: str) -> None:
    (q, k), count = inputs(), len(ROWS)
    parts = {
        "striped": [torch.arange(i, count, 3) for i in range(3)],
        "contiguous": [torch.arange(0, 140), torch.arange(140, 246), torch.arange(246, count)],  # the last is padding
        "shuffled": list(torch.randperm(count, generator=torch.Generator().manual_seed(1)).split(100)),
    }[shards]
    expected = by_row(select(mechanism, q, k, ROWS), torch.arange(count))
    selections, summed_bytes = select_on_ranks(mechanism, q, k, ROWS, parts)
    assert summed_bytes == mechanism.all_reduce_bytes(ROWS, Heads(query=4, kv=2), 16)
    got = {}
    for part, selection in zip(parts, selections, strict=True):
        got |= by_row(selection, part)
    assert got == expected


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_sharded_heads_select_the_same(mechanism: Routed) -> None:
    q, k = inputs()
    expected = by_row(select(mechanism, q, k, ROWS), torch.arange(len(ROWS)))
    for heads in (range(0, 2), range(3, 4)):
        share = HeadShare(all_heads=Heads(query=4, kv=2), head_range=heads)
        kv = slice(heads.start // 2, heads.start // 2 + 1)
        selection = select(mechanism, q[:, heads.start : heads.stop], k[:, kv], ROWS, share=share)
        found = by_row(selection, torch.arange(len(ROWS)), heads)
        assert found == {(head, row): blocks for (head, row), blocks in expected.items() if head in heads}


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_selected_blocks_hold_visible_keys(mechanism: Routed) -> None:
    """Blocks of other documents, later ones and empty ones are never on a list."""
    q, k = inputs()
    selection = select(mechanism, q, k, ROWS)
    blocks, visible = mechanism.key_blocks(ROWS).of(ROWS), mechanism.attention_mask().mask(ROWS, ROWS)
    for (_, query_block), chosen in lists(selection).items():
        seen = visible[selection.query_block == query_block].any(dim=0)
        assert set(chosen) <= set(blocks[seen].tolist())
        assert chosen == sorted(set(chosen))


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_pairs_are_counted(mechanism: Routed) -> None:
    q, k = inputs()
    plan = Plan.build(ROWS, ROWS, mechanism.attention_mask(), heads=4, selection=select(mechanism, q, k, ROWS))
    assert count_pairs(plan, kv_heads=2) == int(plan.mask().sum()) // 4
    assert 0 < mechanism.unmasked_pairs(ROWS) <= int(mechanism.attention_mask().mask(ROWS, ROWS).sum())


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_flops_of_a_long_sequence_are_estimated_by_some_queries(
    mechanism: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, asked = Rows.packed([320, 1, 257, 150, 35] * 4, padding=9), []
    exact = 2 * (8 + 4) * mechanism.unmasked_pairs(rows)
    # A short one is counted in full.
    assert mechanism.useful_flops(ROWS, 8, 4) == 2 * (8 + 4) * mechanism.unmasked_pairs(ROWS)
    monkeypatch.setattr(routed, "SAMPLED", 800)
    select = type(mechanism).select

    def noted(self: Routed, q: Tensor, k: Tensor, local_shard: LocalShard) -> BlockSelection:
        asked.append(len(q))
        return select(self, q, k, local_shard)

    monkeypatch.setattr(type(mechanism), "select", noted)
    assert mechanism.useful_flops(rows, 8, 4) == pytest.approx(exact, rel=0.12)
    assert all(queries <= 800 for queries in asked)
    assert asked or isinstance(mechanism, MoBA)


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_memory_is_bounded_by_parts(mechanism: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection is the same where scores are computed a few queries at a time, and then only so many exist."""
    q, k = inputs(torch.float32)
    expected, most, found = lists(select(mechanism, q, k, ROWS)), 100, []

    def noted(q: Tensor, summary: Tensor) -> Tensor:
        scores = affinity(q, summary)
        found.append(scores.numel())
        return scores

    for name in ("_tile_selection", "moba", "vmoba"):
        module = f"farspan.kernels.mechanisms.{name}"
        monkeypatch.setattr(f"{module}.SCORES_AT_ONCE", most)
        monkeypatch.setattr(f"{module}.affinity", noted)
    monkeypatch.setattr("farspan.kernels.mechanisms.block_sparse.TILES_AT_ONCE", 3)
    assert lists(select(mechanism, q, k, ROWS)) == expected
    # Those of one query or tile at least.
    assert max(found, default=0) <= max(most, q.shape[1] * mechanism.key_blocks(ROWS).count)
    assert isinstance(mechanism, BlockSparse) or len(found) > 1


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_blocks_of_other_documents_are_not_scored(mechanism: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 documents of a token; pairs of all blocks would be 90,000 a head."""
    rows, scored = Rows.packed([1] * 300), []

    def counted(q: Tensor, summary: Tensor) -> Tensor:
        scored.append(len(q) * len(summary))
        return affinity(q, summary)

    most = 4 * 300 * 10
    for name in ("_tile_selection", "moba", "vmoba"):
        module = f"farspan.kernels.mechanisms.{name}"
        monkeypatch.setattr(f"{module}.SCORES_AT_ONCE", most)
        monkeypatch.setattr(f"{module}.affinity", counted)
    q, k = normal((300, 4, 16), (300, 2, 16))
    found = lists(select(mechanism, q, k, rows))
    # A mask may be empty for a tile; all else selects its only block.
    assert all(blocks in ([], mechanism.key_blocks(rows).of(rows)[row : row + 1].tolist()) for (_, row), blocks in
               found.items())  # fmt: skip
    assert max(scored, default=0) <= 100

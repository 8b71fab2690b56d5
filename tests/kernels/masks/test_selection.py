import pytest
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning import gathered_batches
from farspan.kernels.planning.gathered_batches import selection_batches
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind
from tests.support import oracle
from tests.support.batches import covered


def test_blocks_are_numbered_document_by_document() -> None:
    rows = Rows.packed([5, 2, 4], padding=1)
    blocks = BlockPartition.blocks(rows, 2)
    assert blocks.of(rows).tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, -1]
    assert blocks.sizes.tolist() == [2, 2, 1, 2, 2, 2]
    assert blocks.count == 6
    some = rows.take(torch.tensor([10, -1, 4, 0]))
    assert blocks.of(some).tolist() == [5, -1, 2, 0]
    sums = blocks.sums(torch.arange(12.0), rows)
    assert sums.tolist() == [1, 5, 4, 11, 15, 19]


def test_no_rows_have_no_blocks() -> None:
    rows = Rows.packed([], padding=3)
    blocks = BlockPartition.blocks(rows, 2)
    assert blocks.count == 0
    assert blocks.of(rows).tolist() == [-1, -1, -1]


def test_lists_and_masks_are_equal() -> None:
    rows = Rows.packed([6, 4])
    blocks, query_block = BlockPartition.blocks(rows, 2), torch.arange(10)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 10, 5, generator=generator) < 0.4
    # Some of the blocks for some of the queries.
    some = [slice(0, 5), slice(2, 4), slice(1, 5)]
    mask[:, 3, [0, 1, 4]] = mask[:, 4:, 0] = False
    lists = torch.where(mask, torch.arange(5), -1).flip(2)
    parts = [(blocks, part[:, :, blocks]) for blocks, part in zip(some, mask.split((3, 1, 6), dim=1), strict=True)]
    for selection in (
        BlockSelection.from_parts(query_block, blocks, parts, heads=3),
        BlockSelection.from_lists(query_block, blocks, lists),
    ):
        assert torch.equal(selection.mask(rows), mask[:, :, blocks.of(rows)])
        assert torch.equal(selection.mask(rows), oracle.selected_mask(selection, rows, 3))


@pytest.mark.parametrize(("block_rows", "head_groups"), [(1, 4), (1, 2), (16, 4), (16, 2)])
@pytest.mark.parametrize(
    "attention_mask",
    [
        AttentionMask(),
        AttentionMask(causal=False),
        AttentionMask(window=20),
        AttentionMask(window=(9, 30, 9, 60), sinks=3),
    ],
    ids=str,
)
def test_batches_hold_every_selected_pair_once(
    block_rows: int, head_groups: int, attention_mask: AttentionMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Problems are split into as many parts, with filler rows where these are uneven.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    rows = Rows.packed([70, 1, 33, 40], padding=5)
    blocks = BlockPartition.blocks(rows, 8)
    query_blocks = BlockPartition.blocks(rows, block_rows)
    selected = torch.rand(head_groups, query_blocks.count, blocks.count, generator=generator) < 0.4
    in_order = torch.arange(149)
    orders = [in_order, torch.randperm(149, generator=generator), in_order[::3], in_order[60:]]
    for query_order in orders:
        queries = rows.take(query_order)
        parts = [(slice(0, blocks.count), selected)]
        selection = BlockSelection.from_parts(query_blocks.of(queries), blocks, parts, heads=head_groups)
        for key_order in orders:
            keys = rows.take(key_order)
            plan = Plan.build(queries, keys, attention_mask, heads=4, selection=selection)
            expected = oracle.visible_mask(queries, keys, attention_mask, 4) & oracle.selected_mask(selection, keys, 4)
            assert torch.equal(covered(selection_batches(plan, 2), plan, 2), expected.int())


@pytest.mark.parametrize(("block_rows", "kind"), [(1, Kind.MASKED), (16, Kind.FULL)])
def test_a_batch_of_several_problems_is_bounded(block_rows: int, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows that it gathers, or the pairs of its mask; one problem more where they do not come out even."""
    monkeypatch.setattr(gathered_batches, "BATCH_ROWS", 200)
    monkeypatch.setattr(gathered_batches, "BATCH_PAIRS", 500)
    rows = Rows.packed([320])
    blocks, query_blocks = BlockPartition.blocks(rows, 8), BlockPartition.blocks(rows, block_rows)
    selected = torch.rand(2, query_blocks.count, blocks.count, generator=torch.Generator().manual_seed(0)) < 0.4
    selection = BlockSelection.from_parts(query_blocks.of(rows), blocks, [(slice(0, blocks.count), selected)], heads=2)
    plan = Plan.build(rows, rows, AttentionMask(), heads=4, selection=selection)
    several = [batch for batch in selection_batches(plan, 2) if len(batch.queries) > 1]
    assert kind in {batch.kind for batch in several}
    for batch in several:
        problems, num_keys = batch.keys.shape
        size, bound = (num_keys, 200) if batch.kind is Kind.FULL else (batch.queries.shape[1] * num_keys, 500)
        assert batch.kind is Kind.CAUSAL or problems * size < bound + size

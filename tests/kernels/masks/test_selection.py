import pytest
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.gathered_batches import Batch, batches
from farspan.kernels.planning.plan import Plan
from tests.support import oracle


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


def test_lists_and_masks_say_the_same() -> None:
    rows = Rows.packed([6, 4])
    blocks, unit = BlockPartition.blocks(rows, 2), torch.arange(10)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 10, 5, generator=generator) < 0.4
    lists = torch.where(mask, torch.arange(5), -1).flip(2)
    parts = mask.split((3, 1, 6), dim=1)
    for selection in (BlockSelection.from_parts(unit, blocks, parts), BlockSelection.from_lists(unit, blocks, lists)):
        assert torch.equal(selection.mask(rows), mask[:, :, blocks.of(rows)])
        assert torch.equal(selection.mask(rows), oracle.selected_mask(selection, rows, 3))


def covered(plan: Plan, kv_heads: int) -> torch.Tensor:
    """How many batches claim each pair, int32 `[heads, queries, keys]`."""
    count = torch.zeros(plan.heads, len(plan.queries), len(plan.keys), dtype=torch.int32)
    for batch in batches(plan, kv_heads):
        claimed = batch.queries.numel() - batch.surplus
        assert batch.queries.flatten()[:claimed].unique().numel() == batch.queries.unique().numel() == claimed
        _claim(batch, count, kv_heads)
    return count


def _claim(batch: Batch, count: torch.Tensor, kv_heads: int) -> None:
    heads = count.shape[0]
    for number, (queries, keys) in enumerate(zip(batch.queries, batch.keys, strict=True)):
        full = torch.ones(len(queries), len(keys), dtype=torch.int32)
        part = {"full": full, "causal": full.tril()}.get(batch.kind.value)
        if part is None:
            assert batch.mask is not None
            part = batch.mask[number].int()
        if number == len(batch.queries) - 1:
            queries, part = queries[: len(queries) - batch.surplus], part[: len(queries) - batch.surplus]
        head, row, key = queries % heads, queries // heads, keys // kv_heads
        assert (head // (heads // kv_heads))[:, None].eq((keys % kv_heads)[None]).all()
        count[head[:, None], row[:, None], key[None, :]] += part


@pytest.mark.parametrize(("unit_rows", "choosers"), [(1, 4), (1, 2), (16, 4), (16, 2)])
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
def test_batches_hold_every_chosen_pair_once(
    unit_rows: int, choosers: int, attention_mask: AttentionMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tasks are cut into as many parts, and filled up where these are uneven.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(0)
    rows = Rows.packed([70, 1, 33, 40], padding=5)
    blocks = BlockPartition.blocks(rows, 8)
    units = BlockPartition.blocks(rows, unit_rows)
    chosen = torch.rand(choosers, units.count, blocks.count, generator=generator) < 0.4
    orders = [
        torch.arange(149),
        torch.randperm(149, generator=generator),
        torch.arange(0, 149, 3),
        torch.arange(60, 149),
    ]
    for queries in orders:
        mine = rows.take(queries)
        selection = BlockSelection.from_parts(units.of(mine), blocks, [chosen])
        for keys in orders:
            others = rows.take(keys)
            plan = Plan.build(mine, others, attention_mask, heads=4, selection=selection)
            expected = oracle.visible_mask(mine, others, attention_mask, 4) & oracle.selected_mask(selection, others, 4)
            assert torch.equal(covered(plan, 2), expected.int())

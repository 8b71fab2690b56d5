"""Tile lists of a mask: what they cover, that both directions agree, what they cost."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels import block_mask
from farspan.kernels.triton_kernels.block_mask import COUNT_BITS, MAX_COUNT, TiledPlan, tile_plan
from tests.support.block_masks import decode

GENERATOR = torch.Generator().manual_seed(0)
ROWS = {
    "one": Rows.packed([200]),
    "long": Rows.packed([900]),
    "ragged": Rows.packed([1, 40, 3, 120, 33], padding=5),
    "padding_only": Rows.packed([], padding=9),
    "shuffled": Rows.packed([90, 30], padding=3).take(torch.randperm(123, generator=GENERATOR)),
    "zigzag": Rows.packed([256]).take(torch.cat((torch.arange(32, 64), torch.arange(192, 224)))),
    "nothing": Rows.packed([]),
}
ATTENTION_MASKS = [
    AttentionMask(),
    AttentionMask(causal=False),
    AttentionMask(window=40, sinks=3),
    AttentionMask(causal=False, window=(1, 90, 1, 7)),
    AttentionMask(causal=False, neighborhood=Neighborhood(dimensions=(Dimension(length=64, window=7, stride=3),))),
    AttentionMask(
        causal=False,
        neighborhood=Neighborhood(
            dimensions=(Dimension(length=4, window=2), Dimension(length=9, window=3, dilation=2))
        ),
    ),
]


def rows_of_tiles(tiling: Tiling) -> Tensor:
    """The rows of each tile, -1 for none."""
    if tiling.index is not None:
        return torch.from_numpy(tiling.index).long()
    index = torch.arange(len(tiling) * tiling.size)
    return index.masked_fill(index >= len(tiling.rows), -1)


def mask_by_tile(plan: Plan, tiled: TiledPlan) -> Tensor:
    """The plan's mask by rows of the tiles, bool `[heads, query tiles, query tile, key tiles, key tile]`."""
    mask = torch.nn.functional.pad(plan.mask(), (0, 1, 0, 1))
    mask = mask[:, rows_of_tiles(tiled.queries)][:, :, rows_of_tiles(tiled.keys)]
    return mask.unflatten(2, (len(tiled.keys), tiled.keys.size)).unflatten(1, (len(tiled.queries), tiled.queries.size))


def check(plan: Plan, query_tile: int, key_tile: int) -> TiledPlan:
    """Full visits have no masked pair, partial ones hold the rest, and both directions agree."""
    tiled = tile_plan(plan, query_tile, key_tile, "queries")
    tiles = len(tiled.queries), len(tiled.keys)
    (all_full, all_partial), mask = decode(tiled.lists, *tiles), mask_by_tile(plan, tiled)
    has_some = mask.any(dim=4).any(dim=2)
    # Queries without any key are padding, or as good as padding.
    padding = ~mask.any(dim=4).any(dim=3, keepdim=True).unsqueeze(4)
    has_all = (mask | padding).all(dim=4).all(dim=2) & has_some
    group = tiled.lists.group.long()
    full, partial = all_full[group], all_partial[group]
    assert not (full & partial).any()
    assert not (has_some & ~full & ~partial).any()
    assert not (full & ~has_all).any()
    transposed = tile_plan(plan, query_tile, key_tile, "keys")
    assert torch.equal(transposed.lists.group, tiled.lists.group)
    for back, visits in zip(decode(transposed.lists, *reversed(tiles)), (all_full, all_partial), strict=True):
        assert torch.equal(back.transpose(1, 2), visits)
    work = (all_full.long() + all_partial.long()).sum(dim=(0, 2))
    assert (work[tiled.lists.order.long()].diff() <= 0).all()
    return tiled


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_lists_hold_every_unmasked_pair(rows: str, attention_mask: AttentionMask) -> None:
    for keys in (ROWS[rows], ROWS["zigzag"]):
        check(Plan.build(ROWS[rows], keys, attention_mask, heads=4), 16, 8)


def test_the_example_of_the_docstring() -> None:
    rows = Rows.packed([12])
    lists = tile_plan(Plan.build(rows, rows, AttentionMask(), heads=1), 4, 3, "queries").lists
    runs = [(run >> COUNT_BITS, run & MAX_COUNT) for run in lists.runs.tolist()]
    assert runs == [(0, 2), (0, 1), (1, 2), (0, 3), (3, 1), (0, 0)]
    assert lists.offsets.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert lists.counts.tolist() == [0, 2, 1, 2, 3, 1]
    assert lists.order.tolist() == [2, 1, 0]


def test_lists_do_not_depend_on_how_many_pairs_are_tested_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask, "PAIRS_AT_ONCE", block_mask.COARSE**2)
    rows = ROWS["long"]
    check(Plan.build(rows, rows, AttentionMask(window=(50, 9, 50, 50)), heads=4), 16, 8)


def test_heads_with_equal_masks_share_lists() -> None:
    rows = ROWS["one"]
    plan = Plan.build(rows, rows, AttentionMask(window=(5, 9, 5, 9)), heads=4)
    assert check(plan, 16, 8).lists.group.tolist() == [0, 1, 0, 1]


def test_causal_attention_takes_few_runs() -> None:
    rows = Rows.packed([128 * 300])
    lists = tile_plan(Plan.build(rows, rows, AttentionMask(), heads=8), 128, 128, "queries").lists
    assert len(lists.runs) <= 2 * 300 + 1
    assert int(lists.counts.sum()) == 300 * 301 // 2


def test_no_run_is_longer_than_its_bits() -> None:
    rows = Rows.packed([5000 * 16])
    plan = Plan.build(Rows.packed([5000 * 16]), rows, AttentionMask(causal=False), heads=1)
    lists = tile_plan(plan, 4096, 16, "queries").lists
    counts = lists.runs[:-1] & MAX_COUNT
    assert counts.max() <= MAX_COUNT
    assert lists.counts.view(-1, 2)[:, 0].tolist() == [5000] * 20


def test_many_small_documents_are_not_compared_with_each_other() -> None:
    """32,768 documents: all pairs of tiles would be 67 million."""
    rows = Rows.packed([32] * 32768)
    lists = tile_plan(Plan.build(rows, rows, AttentionMask(), heads=8), 128, 128, "queries").lists
    assert int(lists.counts.sum()) == 8192


def test_too_many_tiles_are_refused() -> None:
    rows = Rows.packed([1 << 20])
    plan = Plan.build(rows, Rows.packed([5]), AttentionMask(), heads=1)
    with pytest.raises(ValueError, match="make more than 524287 tiles of 1 x 16"):
        tile_plan(plan, 1, 16, "queries")

"""Tile lists by themselves: what they cover, that both directions agree, what they cost."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels import block_mask
from farspan.kernels.triton_kernels.block_mask import COUNT_BITS, MAX_COUNT, BlockMask, TiledPlan, tile_plan

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


def decode(lists: BlockMask, others: int) -> tuple[Tensor, Tensor]:
    """Whether a group's tile visits another in full, and in part: both `[groups, tiles, other tiles]`.

    The lists are followed run by run; a tile that is visited twice fails.
    """
    groups, tiles = int(lists.group.max()) + 1, len(lists.order)
    found = torch.zeros(2 * groups * tiles, others, dtype=torch.int32)
    offsets, runs = lists.offsets.tolist(), lists.runs.tolist()
    assert len(offsets) == len(found) + 1
    assert len(runs) == offsets[-1] + 1
    for number in range(len(found)):
        for run in runs[offsets[number] : offsets[number + 1]]:
            first, count = run >> COUNT_BITS, run & MAX_COUNT
            assert count > 0
            assert first + count <= others
            found[number, first : first + count] += 1
    assert torch.equal(found.sum(dim=1), lists.counts.long().flatten())
    assert not (found > 1).any()
    full, partial = found.bool().view(groups, tiles, 2, others).unbind(2)
    return full, partial


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
    (all_full, all_partial), mask = decode(tiled.lists, len(tiled.keys)), mask_by_tile(plan, tiled)
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
    for back, visits in zip(decode(transposed.lists, len(tiled.queries)), (all_full, all_partial), strict=True):
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


def random_selection(rows: Rows, tile: int, block: int, heads: int, copies: int = 1) -> BlockSelection:
    blocks = BlockPartition.blocks(rows, block)
    query_block = BlockPartition.blocks(rows, tile).of(rows)
    num_query_blocks = int(query_block.max()) + 1 if len(rows) else 0
    mask = torch.rand(heads, num_query_blocks, blocks.count, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = mask.repeat(copies, 1, 1)
    return BlockSelection.from_parts(query_block, blocks, [(slice(0, blocks.count), mask)], heads=len(mask))


@pytest.mark.parametrize(("tile", "block"), [(16, 8), (32, 16), (20, 12), (5, 3)])
@pytest.mark.parametrize("rows", ROWS)
def test_lists_follow_a_selection(rows: str, tile: int, block: int) -> None:
    selection = random_selection(ROWS[rows], tile, block, heads=4)
    plan = Plan.build(ROWS[rows], ROWS[rows], AttentionMask(window=(50, 9, 50, 50)), heads=4, selection=selection)
    tiled = check(plan, 16, 8)
    if rows == "one" and (tile, block) == (16, 8):
        assert tiled.queries.index is None
        assert tiled.keys.index is None
    if rows == "shuffled":
        assert tiled.queries.index is not None


def test_lists_do_not_depend_on_how_many_pairs_are_tested_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask, "PAIRS_AT_ONCE", block_mask.COARSE**2)
    rows = ROWS["long"]
    for selection in (None, random_selection(rows, 20, 12, heads=4)):
        check(Plan.build(rows, rows, AttentionMask(window=(50, 9, 50, 50)), heads=4, selection=selection), 16, 8)


def test_heads_with_equal_masks_share_lists() -> None:
    rows = ROWS["one"]
    plan = Plan.build(rows, rows, AttentionMask(window=(5, 9, 5, 9)), heads=4)
    assert check(plan, 16, 8).lists.group.tolist() == [0, 1, 0, 1]
    # Heads 0 and 2, and 1 and 3, select the same blocks.
    selection = random_selection(rows, 16, 8, heads=2, copies=2)
    plan = Plan.build(rows, rows, AttentionMask(), heads=4, selection=selection)
    assert check(plan, 16, 8).lists.group.tolist() == [0, 1, 0, 1]
    # The same blocks one after another, but of other tiles: 0 | 1 2 and 0 1 | 2.
    blocks, tiles = BlockPartition.blocks(rows, 8), BlockPartition.blocks(rows, 16).of(rows)
    selection = BlockSelection(
        heads=2,
        query_block=tiles,
        blocks=blocks,
        offsets=torch.tensor([0, *[1] * 12, 3, 5, *[6] * 12]),
        key_blocks=torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32),
    )
    plan = Plan.build(rows, rows, AttentionMask(), heads=2, selection=selection)
    assert check(plan, 16, 8).lists.group.tolist() == [0, 1]


@pytest.mark.parametrize("rows", ROWS)
def test_lists_follow_lifetimes(rows: str) -> None:
    keys = ROWS[rows]
    lifetime = keys.position + torch.randint(-1, 300, (2, len(keys)), generator=GENERATOR, dtype=torch.int32)
    lifetime[1, : len(keys) // 2] = 2**31 - 1
    plan = Plan.build(keys, keys, AttentionMask(), heads=4).with_lifetimes(lifetime)
    tiled = check(plan, 16, 8)
    assert tiled.lists.group.tolist() == [0, 0, 1, 1]


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


MEMORY = """
import re
import torch
from farspan.kernels.planning.plan import Plan
from farspan.kernels.masks.rows import Rows
from farspan.kernels.ragged import offsets_of
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.triton_kernels.block_mask import tile_plan
from farspan.kernels.masks.attention_mask import AttentionMask

tiles, heads, density = 8192, 8, 0.05
rows = Rows.packed([tiles * 128])
blocks = BlockPartition.blocks(rows, 128)
rank = torch.arange(tiles)
generator = torch.Generator().manual_seed(0)
chosen, counts = [], []
for part in rank.split(512):
    mask = (torch.rand(len(part), tiles, generator=generator) < density) & (rank <= part[:, None])
    chosen.append(mask.nonzero()[:, 1].int())
    counts.append(mask.sum(dim=1))
counts, chosen = torch.cat(counts), torch.cat(chosen)
# The last tile selects other blocks in each head, so that no two heads share lists.
counts = torch.stack([torch.cat((counts[:-1], counts[-1:] - head)) for head in range(heads)])  # [heads, Q]
chosen = torch.cat([chosen[: len(chosen) - head] for head in range(heads)])
selection = BlockSelection(heads=heads, query_block=rank.repeat_interleave(128), blocks=blocks,
                           offsets=offsets_of(counts), key_blocks=chosen)
plan = Plan.build(rows, rows, AttentionMask(), heads=heads, selection=selection)
del counts, chosen, mask


def kilobytes(name):
    return int(re.search(name + ":\\s+(\\d+)", open("/proc/self/status").read())[1])


open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = kilobytes("VmRSS")
both = [tile_plan(plan, 128, 128, stationary).lists for stationary in ("queries", "keys")]
assert all(int(lists.counts.sum()) == len(selection.key_blocks) for lists in both)
print(len(selection.key_blocks), kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_million_tokens_of_scattered_blocks_take_no_more_than_150_mb() -> None:
    """5 % of the blocks of 128 tokens, 8 heads with lists of their own, both directions: 13 million visits each."""
    # Every array goes back to the system as soon as it is freed: else what was freed before hides what is taken.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment)
    visits, kilobytes = map(int, done.stdout.split())
    assert visits > 13_000_000
    assert kilobytes * 1024 < 150e6

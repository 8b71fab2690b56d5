"""Block masks made on a device, interpreted, against every pair of tiles compared on the host."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.bounds import all_unmasked, any_unmasked
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import tile_lists
from farspan.kernels.triton_kernels.block_mask import query_bounds
from farspan.kernels.triton_kernels.tile_lists import Tiles
from tests.support import triton_interpreter
from tests.support.block_masks import SHARDS, decode

CPU = torch.device("cpu")
# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.patch()
    monkeypatch.setattr(tile_lists, "CHUNK", 8)


def expected(plan: Plan, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Which tiles each query head visits in full and in part, bool `[heads, query tiles, key tiles]`, pair by pair."""
    queries, keys, _ = tiles.on_host
    found = torch.zeros(2, plan.heads, len(queries), len(keys), dtype=torch.bool)
    i, j = torch.ones(found.shape[2:]).nonzero().numpy().T
    for part in plan.parts:
        bounds = query_bounds(queries, part.attention_mask).take(i), keys.bounds(part.attention_mask).take(j)
        some, full = (
            torch.from_numpy(compare(*bounds, part.attention_mask)).view(found.shape[2:])
            for compare in (any_unmasked, all_unmasked)
        )
        for head in part.heads:
            by_content, full_by_content = narrowed(plan, head, tiles)
            left, full_left = some & by_content, full & full_by_content
            found[:, head] = torch.stack((left & full_left, left & ~full_left))
    return found[0], found[1]


def narrowed(plan: Plan, head: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Whether content alone leaves some pair of two tiles, and all of them, bool `[query tiles, key tiles]`."""
    queries, keys, _ = tiles.on_host
    if plan.selection is not None:
        assert queries.number is not None
        assert keys.number is not None
        table = plan.selection.as_lists.table()[head * plan.selection.heads // plan.heads]
        selected = table[torch.from_numpy(queries.number)][:, torch.from_numpy(keys.number)]
        return selected, selected
    assert plan.lifetime is not None
    lifetime = plan.lifetime[head * len(plan.lifetime) // plan.heads]
    some, full = torch.zeros(2, len(queries), len(keys), dtype=torch.bool)
    for i, rows in enumerate(torch.arange(len(plan.queries)).split(queries.size)):
        position = plan.queries.position[rows][plan.queries.document[rows] >= 0]
        for j, life in enumerate(lifetime.split(keys.size)):
            some[i, j] = bool((position[:, None] <= life).any())
            full[i, j] = bool((position[:, None] <= life).all())
    return some, full


def visits(plan: Plan, tiles: Tiles, others: int) -> tuple[Tensor, Tensor]:
    """The same by the lists, of all portions, `[heads, stationary tiles, other tiles]`."""
    heads: list[tuple[Tensor, Tensor]] = []
    done: list[int] = []
    for lists in tiles.block_masks(plan):
        full, partial = decode(lists, tiles.count, others)
        heads.append((full[lists.group.long()], partial[lists.group.long()]))
        done += lists.order.tolist()
    assert sorted(done) == list(range(tiles.count))
    full, partial = (torch.stack(x).any(dim=0) for x in zip(*heads, strict=True))
    return full, partial


def check(plan: Plan, query_tile: int = 16, key_tile: int = 8) -> None:
    """Lists of both sides hold the visits of the oracle, all of them and no others."""
    for stationary in ("queries", "keys"):
        tiles = Tiles.of(plan, query_tile, key_tile, stationary, CPU)
        others = len(tiles.on_host.keys if stationary == "queries" else tiles.on_host.queries)
        found = visits(plan, tiles, others)
        for lists, right in zip(found, expected(plan, tiles), strict=True):
            assert torch.equal(lists if stationary == "queries" else lists.transpose(1, 2), right), stationary


def random_selection(rows: Rows, tile: int, block: int, heads: int) -> BlockSelection:
    blocks = BlockPartition.blocks(rows, block)
    query_block = BlockPartition.blocks(rows, tile).of(rows)
    mask = torch.rand(heads, int(query_block.max()) + 1, blocks.count, generator=torch.Generator().manual_seed(1)) < 0.4
    return BlockSelection.from_parts(query_block, blocks, [(slice(0, blocks.count), mask)], heads=heads)


@pytest.mark.parametrize(("rows", "tile", "block"), [("ragged", 16, 8), ("padding first", 20, 12), ("shuffled", 7, 12)])
def test_lists_follow_a_selection(rows: str, tile: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned with tiles or not, for heads with windows of their own, two of which share a list of blocks."""
    mask = AttentionMask(window=(2, 70, 70, 70), sinks=2) if tile == 20 else AttentionMask()
    plan = Plan.build(SHARDS[rows], SHARDS[rows], mask, heads=4)
    check(plan.with_selection(PackedSelection.pack(random_selection(SHARDS[rows], tile, block, heads=2), CPU)))
    # Some tiles at a time; and lists that the host made.
    monkeypatch.setattr(tile_lists, "LIST_BYTES", 200)
    check(Plan.build(SHARDS[rows], SHARDS[rows], mask, heads=4, selection=random_selection(SHARDS[rows], 16, 8, 1)))


def test_more_blocks_than_a_word_has_bits() -> None:
    rows = Rows.packed([100, 60])
    check(Plan.build(rows, rows, AttentionMask(), heads=1, selection=random_selection(rows, 20, 4, heads=1)), 32, 8)


@pytest.mark.parametrize("rows", SHARDS)
def test_lists_follow_lifetimes(rows: str) -> None:
    keys = SHARDS[rows]
    lifetime = keys.position + torch.randint(-1, 40, (2, len(keys)), generator=torch.Generator().manual_seed(2))
    # Lives that end with the first and with the last token of a tile of queries; the last keys are not even seen by
    # their own query.
    lifetime[0] = lifetime[0] // 16 * 16
    lifetime[1] = lifetime[1] // 16 * 16 + 15
    lifetime[1, : len(keys) // 4] = 2**31 - 1
    lifetime[1, 16:24] = 47
    lifetime[:, -6:] = -1
    lifetime.masked_fill_(keys.document < 0, -1)
    check(Plan.build(keys, keys, AttentionMask(), heads=4).with_lifetimes(lifetime.int()))


def test_plans_under_one_mask_keep_their_lists_apart() -> None:
    """Selections of other blocks and of other heads, and lifetimes: what they share is of the mask alone."""
    rows = SHARDS["shuffled"]
    plan = Plan.build(rows, rows, AttentionMask(), heads=4)
    of_all = PackedSelection.pack(random_selection(rows, 16, 8, heads=4), CPU)
    of_two = replace(of_all, stored=of_all.bits[:, 1::2].contiguous())
    for selection in (of_all, of_two, PackedSelection.pack(random_selection(rows, 20, 12, heads=1), CPU)):
        check(plan.with_selection(selection))
    check(plan.with_lifetimes((rows.position + 9).masked_fill(rows.document < 0, -1).int().repeat(2, 1)))


def test_no_list_waits_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers, of which asking for one is an error; the kernel is not run."""
    launched: list[tuple[int]] = []
    monkeypatch.setattr(tile_lists, "narrow_kernel", Launches(launched))
    rows, device = SHARDS["padding first"], torch.device("meta")
    plan, chosen = Plan.build(rows, rows, AttentionMask(), heads=4), random_selection(rows, 16, 8, heads=2)
    narrowed = (
        plan.with_selection(PackedSelection.pack(chosen, device)),
        plan.with_lifetimes(torch.empty(2, len(rows), dtype=torch.int32, device=device)),
    )
    for stationary in ("queries", "keys"):
        for each in narrowed:
            (lists,) = Tiles.of(each, 16, 8, stationary, device).block_masks(each)
            assert all(column.device == device for column in lists)
    assert len(launched) == 4


class Launches:
    """A kernel that notes its grids."""

    def __init__(self, grids: list[tuple[int]]) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_tiles_and_their_lists_by_the_mask_are_made_once_for_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with selections, or lifetimes, of their own share all that the host plans."""
    rows = Rows.packed([60, 20])
    plan, selection = Plan.build(rows, rows, AttentionMask(), heads=2), random_selection(rows, 16, 8, heads=2)

    def layers() -> Iterator[Plan]:
        for _ in range(2):
            packed = PackedSelection.pack(selection, CPU)
            yield plan.with_selection(packed)
            yield plan.with_lifetimes(rows.position.expand(2, -1).contiguous())

    for narrowed in list(layers())[:2]:
        list(Tiles.of(narrowed, 16, 8, "queries", CPU).block_masks(narrowed))
    monkeypatch.setattr(tile_lists, "tile_plan", None)
    monkeypatch.setattr(tile_lists, "copy_to", None)
    for narrowed in layers():
        list(Tiles.of(narrowed, 16, 8, "queries", CPU).block_masks(narrowed))
        assert not narrowed.cache

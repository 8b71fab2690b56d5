"""Plans: every visible pair in exactly one region, whatever the rows."""

import random
import tracemalloc

import pytest
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind
from tests.support.oracle import visible_mask


def covered(plan: Plan) -> torch.Tensor:
    """How many regions claim each pair, by the definition of the kinds, int32 `[queries, keys]`."""
    count = torch.zeros(len(plan.queries), len(plan.keys), dtype=torch.int32)
    for region in plan.parts[0].regions:
        part = count[region.queries, region.keys]
        assert part.numel() > 0, region
        if region.kind is Kind.MASKED:
            part += plan.region_mask(plan.parts[0].attention_mask, region).int()
        else:
            ones = torch.ones_like(part)
            part += {Kind.FULL: ones, Kind.CAUSAL: ones.tril(), Kind.ANTICAUSAL: ones.triu()}[region.kind]
            assert region.kind is not Kind.ANTICAUSAL or part.shape[0] == part.shape[1]
    return count


def check(plan: Plan) -> None:
    """Each visible pair is in one region, and no other pair is; they are counted."""
    mask = visible_mask(plan.queries, plan.keys, plan.attention_mask, 1)[0]
    assert torch.equal(covered(plan), mask.int())
    assert plan.unmasked_pairs == int(mask.sum())


def random_rows(rng: random.Random, rows: Rows) -> Rows:
    """A shard as some rank of some layout would hold it, or rows in no order at all."""
    index, degree = torch.arange(len(rows)), rng.choice([1, 2, 3, 4])
    rank = rng.randrange(degree)
    kind = rng.choice(["contiguous", "striped", "zigzag", "any"])
    if kind == "contiguous":
        index = index.tensor_split(degree)[rank]
    elif kind == "striped":
        index = index[rank::degree]
    elif kind == "zigzag":
        chunks = index.tensor_split(2 * degree)
        index = torch.cat((chunks[rank], chunks[-1 - rank]))
    else:
        index = index[torch.randperm(len(rows), generator=torch.Generator().manual_seed(rng.randrange(1000)))]
    return rows.take(index)


@pytest.mark.parametrize("seed", range(12))
def test_regions_hold_every_visible_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(15):
        longest = rng.choice([5, 80, 200])
        rows = Rows.packed([rng.randint(1, longest) for _ in range(rng.randint(1, 5))], rng.choice([0, 7]))
        window = rng.choice([None, None, 1, 3, 20, 100, 500])
        sinks = 0 if window is None else rng.choice([0, 0, 1, 9, 64])
        attention_mask = AttentionMask(causal=rng.random() < 0.7, window=window, sinks=sinks)
        queries, keys = random_rows(rng, rows), random_rows(rng, rows)
        check(Plan.build(queries, keys, attention_mask, shortest_run=rng.choice([2, 8, 32]), heads=1))


GRIDS = [
    (Dimension(length=50, window=7),),
    (Dimension(length=40, window=6, stride=3, dilation=2, causal=True),),
    (Dimension(length=4, window=2, causal=True), Dimension(length=9, window=4, stride=4)),
    (Dimension(length=3, window=2), Dimension(length=7, window=3, dilation=2), Dimension(length=5, window=5)),
]


@pytest.mark.parametrize("dimensions", GRIDS, ids=len)
def test_regions_hold_every_neighbor_once(dimensions: tuple[Dimension, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    neighborhood = Neighborhood(dimensions=dimensions)
    monkeypatch.setattr("farspan.kernels.planning.regions.IRREGULAR_TILE", 8)
    rng = random.Random(0)
    for causal in (False, True):
        rows = Rows.packed([neighborhood.tokens, 2 * neighborhood.tokens + 3, 5], padding=4)
        queries, keys = random_rows(rng, rows), random_rows(rng, rows)
        check(Plan.build(queries, keys, AttentionMask(causal=causal, neighborhood=neighborhood), heads=1))


def test_far_tiles_of_a_grid_are_not_visited() -> None:
    grid = Neighborhood(dimensions=(Dimension(length=64, window=4), Dimension(length=128, window=128)))
    rows = Rows.packed([grid.tokens])
    plan = Plan.build(rows, rows, AttentionMask(causal=False, neighborhood=grid), heads=1)
    assert {region.kind for region in plan.parts[0].regions} == {Kind.FULL}
    assert plan.unmasked_pairs == grid.tokens * 4 * 128


def test_each_head_has_its_own_window() -> None:
    rows = Rows.packed([100])
    plan = Plan.build(rows, rows, AttentionMask(window=(5, 100, 5)), heads=3)
    assert [part.heads for part in plan.parts] == [(0, 2), (1,)]
    assert plan.unmasked_pairs == (2 * (100 * 5 - 10) + 5050) // 3
    with pytest.raises(ValueError, match="3 windows for 4 query heads"):
        Plan.build(rows, rows, AttentionMask(window=(5, 100, 5)), heads=4)


def test_a_causal_document_is_one_region_and_a_zigzag_step_needs_no_mask() -> None:
    rows = Rows.packed([4096])
    (region,) = Plan.build(rows, rows, AttentionMask(), heads=1).parts[0].regions
    assert region.kind is Kind.CAUSAL
    chunks = torch.arange(4096).chunk(8)
    local, remote = rows.take(torch.cat((chunks[1], chunks[6]))), rows.take(torch.cat((chunks[0], chunks[7])))
    for keys in (local, remote):
        plan = Plan.build(local, keys, AttentionMask(), heads=1)
        assert {region.kind for region in plan.parts[0].regions} <= {Kind.FULL, Kind.CAUSAL}


def test_a_million_tokens_are_planned_by_their_runs() -> None:
    """Work and size follow the number of documents, not of pairs: 10^12 pairs."""
    rows = Rows.packed([500_000, 300_000, 248_576])
    plan = Plan.build(rows, rows, AttentionMask(), heads=1)
    assert len(plan.parts[0].regions) == 3
    assert plan.unmasked_pairs == sum(n * (n + 1) // 2 for n in (500_000, 300_000, 248_576))


def test_masks_stay_small_where_runs_do_not_match() -> None:
    """A run of step 1 against a run of step 2 is cut into tiles: no mask grows with the square of the rows."""
    rows = Rows.packed([4096])
    plan = Plan.build(rows, rows.take(torch.arange(0, 4096, 2)), AttentionMask(), heads=1)
    masked = [region for region in plan.parts[0].regions if region.kind is Kind.MASKED]
    assert max((r.query_stop - r.query_start) * (r.key_stop - r.key_start) for r in masked) <= 128 * 128
    assert any(region.kind is Kind.FULL for region in plan.parts[0].regions)


@pytest.mark.parametrize("window", [100, 1024, 32768])
def test_a_window_needs_no_masks(window: int) -> None:
    rows = Rows.packed([65536])
    plan = Plan.build(rows, rows, AttentionMask(window=window), heads=1)
    assert {region.kind for region in plan.parts[0].regions} == {Kind.FULL, Kind.CAUSAL, Kind.ANTICAUSAL}
    assert plan.unmasked_pairs == window * (window + 1) // 2 + (65536 - window) * window


def test_tiny_documents_take_linear_memory() -> None:
    """8,192 documents: 13 MB, and a table of all pairs of them would have 67 MB."""
    rows = Rows.packed([32] * 8192)
    tracemalloc.start()
    try:
        plan = Plan.build(rows, rows, AttentionMask(window=8), heads=1)
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()
    assert plan.unmasked_pairs == 8192 * (32 * 8 - 8 * 7 // 2)


def test_candidates_are_found_in_small_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.kernels.planning.bounds.MAX_CANDIDATES", 7)
    rows = Rows.packed([60, 3, 50, 9, 80]).take(torch.randperm(202, generator=torch.Generator().manual_seed(0)))
    for keys in (rows, Rows.packed([60, 3, 50, 9, 80])):
        check(Plan.build(rows, keys, AttentionMask(), shortest_run=8, heads=1))


def test_padding_in_a_tile_does_not_widen_its_reach() -> None:
    rows = Rows.packed([128] * 64 + [20], padding=12)
    plan = Plan.build(rows, rows, AttentionMask(), heads=1)
    assert len([region for region in plan.parts[0].regions if region.kind is Kind.MASKED]) == 1


@pytest.mark.parametrize("before", [0, 50])
def test_padding_sees_nothing_even_if_its_positions_grow(before: int) -> None:
    rows = Rows.packed([before], padding=60)
    rows = Rows(position=torch.cat((rows.position[:before], torch.arange(60).int())), document=rows.document)
    check(Plan.build(rows, rows, AttentionMask(), shortest_run=8, heads=1))


@pytest.mark.parametrize(("window", "message"), [(0, "must be at least 1"), (2**31, "must be at most 2147483647")])
def test_a_window_has_bounds(window: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"window={window} {message}"):
        AttentionMask(window=window)


def test_the_widest_window_hides_nothing() -> None:
    rows = Rows.packed([20])
    for shortest_run in (4, 32):
        plan = Plan.build(rows, rows, AttentionMask(window=2**31 - 1), shortest_run=shortest_run, heads=1)
        assert plan.unmasked_pairs == 210


def test_lifetimes_go_with_later_queries_of_a_document_only() -> None:
    """Backends need not support lifetimes together with anything else."""
    rows = Rows.packed([20])
    lifetime = torch.full((1, 20), 19, dtype=torch.int32)
    all_blocks = BlockSelection.from_lists(
        torch.arange(20), BlockPartition.blocks(rows, 20), torch.zeros(1, 20, 1, dtype=torch.int64)
    )
    plan = Plan.build(rows, rows, AttentionMask(), heads=1)
    assert torch.equal(plan.with_lifetimes(lifetime).mask(), plan.mask())
    for refused in (
        lambda: plan.with_lifetimes(lifetime).with_selection(all_blocks),
        lambda: plan.with_selection(all_blocks).with_lifetimes(lifetime),
        lambda: Plan.build(rows, rows, AttentionMask(window=5), heads=1).with_lifetimes(lifetime),
        lambda: Plan.build(rows, rows, AttentionMask(causal=False), heads=1).with_lifetimes(lifetime),
    ):
        with pytest.raises(ValueError, match="a plan with lifetimes must be causal"):
            refused()
    for wrong in (lifetime.long(), lifetime[:, 1:]):
        with pytest.raises(ValueError, match="lifetimes must be int32"):
            plan.with_lifetimes(wrong)

"""Fetch moves what is needed: the keys that masks show, against a count of its own, and little besides."""

import pytest
import torch

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.plan import Plan
from farspan.parallel.context_parallel.required_keys import needed_keys
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.simulation import Unconnected
from tests.support.oracle import selected_mask

HEADS = Heads(query=8, kv=2)
SIZES = Sizes.of(torch.bfloat16, 128, 128)


def planned(
    strategy: str, mechanism: Mechanism, shards: Shards, rank: int, heads: Heads = HEADS
) -> DistributedAttention:
    channel = Unconnected(rank, shards.degree)
    return STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="cpu")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_window_moves_its_halo(layout: str) -> None:
    """64K tokens on 8 ranks, window 1024: each stretch needs the 1,023 keys before it, and the ring moves all."""
    tokens, degree, window = 1 << 16, 8, 1024
    shards = Shards.deal(Rows.packed([tokens]), layout=layout, degree=degree)
    needed = 0
    for mine in shards.index:
        reads = torch.zeros(tokens, dtype=torch.bool)
        for back in (1, window - 1):
            reads[(mine - back).clamp(min=0)] = True
        starts = mine[torch.cat((torch.tensor([True]), mine.diff() != 1))]
        for start in starts.tolist():
            reads[max(start - window + 1, 0) : start] = True
        reads[mine] = False
        needed += int(reads.sum()) * HEADS.kv * SIZES.kv_width * SIZES.element_bytes
    fetched, ring = (
        sum(planned(name, Window(window=window), shards, rank).volume(SIZES).forward for rank in range(degree))
        for name in ("fetch", "ring")
    )
    assert needed <= fetched <= 1.05 * needed
    assert fetched <= 0.05 * ring


def test_documents_that_end_on_a_rank_are_not_moved() -> None:
    shards = Shards.deal(Rows.packed([64] * 8), layout="contiguous", degree=4)
    assert [planned("fetch", Dense(), shards, rank).volume(SIZES).forward for rank in range(4)] == [0] * 4
    shards = Shards.deal(Rows.packed([100] + [52] * 3 + [256]), layout="contiguous", degree=4)
    row = HEADS.kv * SIZES.kv_width * SIZES.element_bytes
    # Rank 1 holds 128 to 255: 104 to 127 of rank 0 belong to its first document. Rank 3 reads all of rank 2.
    sent = [planned("fetch", Dense(), shards, rank).volume(SIZES).forward for rank in range(4)]
    assert sent == [28 * row, 0, 128 * row, 0]


NEIGHBOURHOOD = Neighborhood(grid=(160,), window=(21,), stride=(4,), causal=(True,))
MASKED = [x for name in MECHANISMS for x in MECHANISMS.get(name).examples() if isinstance(x, Masked)]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mechanism", MASKED, ids=str)
def test_all_that_is_seen_is_needed(mechanism: Masked, layout: str) -> None:
    """Against a mask with every pair: no key is missing, and none moves in vain but what some chose and others see."""
    rows = Rows.packed([230, 90, 1])
    shards = Shards.deal(rows, layout=layout, degree=4)
    global_rows = shards.rows.take(shards.index.flatten())
    selection = None
    if isinstance(mechanism, Routed):
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(len(rows), n, 16, generator=generator) for n in (HEADS.query, HEADS.kv))
        selection = mechanism.route(rows, HEADS, q, k).selection
    for rank, mine in enumerate(shards.index):
        plan = Plan.build(shards.rows_of(rank), global_rows, mechanism.attention_mask(), heads=HEADS.query)
        shown = plan.mask().any(dim=1).view(HEADS.kv, -1, len(global_rows)).any(dim=1)
        if selection is not None:
            plan = plan.with_selection(selection.of_queries(mine))
        seen = plan.mask().any(dim=1).view(HEADS.kv, -1, len(global_rows)).any(dim=1)
        (needed,) = needed_keys(plan, HEADS.kv)
        assert not (seen & ~needed).any()
        if selection is not None:
            asked = selected_mask(selection.of_queries(mine), global_rows, HEADS.query).any(dim=1)
            assert torch.equal(shown & asked.view(HEADS.kv, -1, len(global_rows)).any(dim=1), needed)
        else:
            assert torch.equal(seen, needed), f"{int((needed & ~seen).sum())} keys in vain"


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mechanism", [Dense(), Window(window=40, sinks=4), NEIGHBOURHOOD], ids=str)
def test_reader_and_owner_agree(mechanism: Masked, layout: str) -> None:
    """What a rank wants is found from its queries, what it gives from its keys; each pair of ranks finds the same."""
    shards = Shards.deal(Rows.packed([230, 90, 1], padding=40), layout=layout, degree=4)
    global_rows = shards.rows.take(shards.index.flatten())
    for rank in range(4):
        mine = shards.rows_of(rank)
        wanted = needed_keys(Plan.build(mine, global_rows, mechanism.attention_mask(), heads=4), 2)[0]
        for owner in range(4):
            plan = Plan.build(global_rows, shards.rows_of(owner), mechanism.attention_mask(), heads=4)
            given = needed_keys(plan, 2, groups=4)[rank]
            assert torch.equal(given, wanted.unflatten(1, (4, -1))[:, owner])

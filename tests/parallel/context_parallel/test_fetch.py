"""Fetch sends the required keys, against a count of its own, and few others."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.required_keys import required_keys
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.mechanisms import examples, normal
from tests.support.oracle import selected_mask

HEADS = Heads(query=8, kv=2)
SIZES = Sizes.of(torch.bfloat16, 128, 128)


def sent(strategy: str, mechanism: Mechanism, shards: Shards) -> list[int]:
    """The bytes that each rank sends forward."""
    strategies = (STRATEGIES.get(strategy)(Unconnected(rank, shards.degree)) for rank in range(shards.degree))
    return [x.prepare(mechanism, shards, HEADS, backend="cpu").volume(SIZES).forward for x in strategies]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_window_sends_its_halo(layout: str) -> None:
    """64K tokens on 8 ranks, window 1024: each chunk requires the 1,023 keys before it, and the ring sends all."""
    tokens, degree, window = 1 << 16, 8, 1024
    shards = Shards.build(Rows.packed([tokens]), layout=layout, degree=degree)
    required = 0
    for local in shards.index:
        reads = torch.zeros(tokens, dtype=torch.bool)
        starts = local[torch.cat((torch.tensor([True]), local.diff() != 1))]
        for start in starts.tolist():
            reads[max(start - window + 1, 0) : start] = True
        reads[local] = False
        required += int(reads.sum()) * HEADS.kv * SIZES.kv_width * SIZES.element_bytes
    fetched, ring = (sum(sent(name, Window(window=window), shards)) for name in ("fetch", "ring"))
    assert required <= fetched <= 1.05 * required
    assert fetched <= 0.05 * ring


def test_documents_that_end_on_a_rank_are_not_sent() -> None:
    shards = Shards.build(Rows.packed([64] * 8), layout="contiguous", degree=4)
    assert sent("fetch", Dense(), shards) == [0] * 4
    shards = Shards.build(Rows.packed([100] + [52] * 3 + [256]), layout="contiguous", degree=4)
    row = HEADS.kv * SIZES.kv_width * SIZES.element_bytes
    # Rank 1 holds 128 to 255: 104 to 127 of rank 0 belong to its first document. Rank 3 reads all of rank 2.
    assert sent("fetch", Dense(), shards) == [28 * row, 0, 128 * row, 0]


NEIGHBORHOOD = Neighborhood(grid=(160,), window=(21,), stride=(4,), causal=(True,))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mechanism", examples(Masked), ids=str)
def test_visible_keys_are_required(mechanism: Masked, layout: str) -> None:
    """Against a mask with every pair: no key is missing, and no other is required."""
    rows = Rows.packed([230, 90, 1])
    shards = Shards.build(rows, layout=layout, degree=4)
    global_rows = shards.rows.take(shards.index.flatten())
    selection = None
    if isinstance(mechanism, Routed):
        q, k = normal((len(rows), HEADS.query, 16), (len(rows), HEADS.kv, 16))
        selection = mechanism.route(rows, HEADS, q, k).selection
    for rank, local in enumerate(shards.index):
        plan = Plan.build(shards.rows_of(rank), global_rows, mechanism.attention_mask(), heads=HEADS.query)
        expected = of_kv_heads(plan.mask())
        if selection is not None:
            plan = plan.with_selection(selection.of_queries(local))
            expected &= of_kv_heads(selected_mask(selection.of_queries(local), global_rows, HEADS.query))
        (required,) = required_keys(plan, HEADS.kv)
        assert not (of_kv_heads(plan.mask()) & ~required).any()
        assert torch.equal(expected, required), f"{int((required & ~expected).sum())} keys too many"


def of_kv_heads(mask: Tensor) -> Tensor:
    """Which keys any query of a KV head's group sees, `[Hk, keys]`, by a mask `[Hq, queries, keys]`."""
    return mask.any(dim=1).unflatten(0, (HEADS.kv, -1)).any(dim=1)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mechanism", [Dense(), Window(window=40, sinks=4), NEIGHBORHOOD], ids=str)
def test_reader_and_owner_agree(mechanism: Masked, layout: str) -> None:
    """Required keys follow from a rank's queries, requested ones from its keys; each pair of ranks agrees."""
    shards = Shards.build(Rows.packed([230, 90, 1], padding=40), layout=layout, degree=4)
    global_rows = shards.rows.take(shards.index.flatten())
    for rank in range(4):
        local = shards.rows_of(rank)
        required = required_keys(Plan.build(local, global_rows, mechanism.attention_mask(), heads=4), 2)[0]
        for owner in range(4):
            plan = Plan.build(global_rows, shards.rows_of(owner), mechanism.attention_mask(), heads=4)
            requested = required_keys(plan, 2, groups=4)[rank]
            assert torch.equal(requested, required.unflatten(1, (4, -1))[:, owner])

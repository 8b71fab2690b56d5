"""Where the rows lie that heads select of sharded tokens, and what goes there."""

import pytest
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, ComposedAttention, DistributedAttention, Sizes
from farspan.parallel.layout import Shards, causal_keys
from tests.support.mechanisms import attend, inputs_of
from tests.support.oracle import assert_close
from tests.support.simulation import simulate_attention

HEADS = Heads(query=4, kv=2)
SIZES = Sizes.of(torch.float64, 8, 4)
PACKED, TINY = [900, 40, 5000, 3, 2500, 1500], [3] * 400 + [4000]
"""Of a tiny document two tokens are selected, as of one of 16."""


@pytest.mark.parametrize("degree", [3, 8])
@pytest.mark.parametrize(
    ("layout", "lengths"),
    [("zigzag", [1 << 14]), ("striped", [1 << 14]), ("striped", TINY), ("balanced", [1 << 14]), ("balanced", PACKED)],
)
def test_ranks_have_equal_work_and_few_pairs_move(layout: str, lengths: list[int], degree: int) -> None:
    """As equal as the layout's tokens; of a random choice few pairs move, unless neighbors are on different ranks."""
    rows, mosa = Rows.packed(lengths), MoSA(sparsity=8)
    shards = Shards.build(rows, layout=layout, degree=degree, work=mosa.keys_per_query)
    planned = STRATEGIES.get("ring")(Unconnected(0, degree)).prepare(mosa, shards, HEADS, backend="cpu")
    assert isinstance(planned, ComposedAttention)
    found = planned.attention.composition(SIZES, lambda: mosa.sample_routing(rows, HEADS))
    ((among, _),) = found.branches
    assert isinstance(among, DistributedAttention)
    index, keys = among.planner.shards.index, causal_keys(among.planner.global_rows)
    work = torch.stack([keys[tokens[tokens >= 0]].sum() for tokens in index])
    assert work.max() <= 1.02 * work.mean()
    counts, part_moved = (index >= 0).sum(dim=1), 1 - found.exchanged[0][0] / sum(found.exchanged[0])
    if len(lengths) == 1:
        assert counts.max() - counts.min() <= 1
    assert layout == "striped" or part_moved < 0.3


@pytest.mark.parametrize("strategy", ["ring", "fetch"])
def test_all_selected_tokens_may_be_on_one_rank(strategy: str) -> None:
    """The last of four, which then sends what the others attend to; these return as much, and other ranks send none."""
    rows, mosa = Rows.packed([128]), MoSA(sparsity=4)
    shards = Shards.build(rows, layout="contiguous", degree=4)
    q, k, v, routing, dout = inputs_of(mosa, 128, HEADS, (8, 4))
    inputs = [q, k, v, routing.abs() + 10 * (torch.arange(128) >= 96)[:, None, None], dout]
    with torch.no_grad():
        found = simulate_attention(strategy, mosa, shards, HEADS, inputs)
        assert_close(found.tensors, attend(mosa, rows, HEADS, inputs))
        selected = mosa.route(rows, HEADS, *inputs[:2], inputs[3])
    assert found.sent == [plan.volume(SIZES, lambda: selected) for plan in found.plans]
    # 32 tokens of 2 heads each, 16 on a rank: q and out of 2 heads, k, v and routing, in 8 bytes.
    inputs_of_pair, out_of_pair, gradients_of_pair = 8 * (2 * 8 + 8 + 4 + 1), 8 * 2 * 4, 8 * (2 * 8 + 8 + 4 + 1)
    for rank, plan in enumerate(found.plans):
        exchanged, last = plan.moves(SIZES, lambda: selected)[-2], rank == 3
        assert exchanged.forward == (48 * inputs_of_pair if last else 16 * out_of_pair)
        assert exchanged.backward == (48 * out_of_pair if last else 16 * gradients_of_pair)

"""Worlds of threads: the same strategies at degrees beyond the processes of one machine, with real transfers."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.window import Window
from farspan.parallel.comm import Channel, Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes
from farspan.parallel.layout import Shards
from tests.support.mechanisms import attend, inputs_of
from tests.support.oracle import assert_close
from tests.support.simulation import simulate, simulate_attention

HEADS = Heads(query=4, kv=2)
ROWS = Rows.packed([391, 7, 250, 1, 112])
"""761 tokens: 12 for each of 64 ranks, the last one with padding."""


@pytest.mark.parametrize(
    ("strategy", "mechanism", "layout", "degree", "inner_size"),
    [
        ("ring", Dense(), "zigzag", 16, 1),
        ("double_ring", Window(window=40), "striped", 16, 4),
        ("gather", MoBA(block=32, top_k=3), "contiguous", 64, 1),
        ("fetch", Window(window=40), "contiguous", 32, 1),
        ("fetch", MoBA(block=32, top_k=3), "zigzag", 16, 1),
        ("ship", MoBA(block=32, top_k=3), "zigzag", 32, 1),
        ("hybrid", Dense(), "zigzag", 64, 4),
        ("hybrid_outer", MoSA(sparsity=4), "contiguous", 32, 8),
        ("state", Lightning(), "zigzag", 32, 1),
    ],
    ids=str,
)
def test_many_ranks_equal_one(strategy: str, mechanism: Mechanism, layout: str, degree: int, inner_size: int) -> None:
    inputs = inputs_of(mechanism, len(ROWS), HEADS, (8, 4))
    shards = Shards.build(ROWS, layout=layout, degree=degree)
    routing = mechanism.route(ROWS, HEADS, *inputs[:2], *inputs[3:-1])
    with torch.no_grad():
        found = simulate_attention(strategy, mechanism, shards, HEADS, inputs, inner_size=inner_size)
        assert_close(found.tensors, attend(mechanism, ROWS, HEADS, inputs), 1e-10)
    assert found.sent == [plan.volume(Sizes.of(torch.float64, 8, 4), lambda: routing) for plan in found.plans]


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_padding_rows_come_out_as_zeros(strategy: str, layout: str) -> None:
    """Results and gradients, whatever the inputs: layers after this one would spread a NaN."""
    mechanism = {"state": Lightning(), "ship": MoBA(block=8, top_k=2)}.get(strategy, Dense())
    shards = Shards.build(Rows.packed([13]), layout=layout, degree=4)
    inner_size = 1 if STRATEGIES.get(strategy).unsupported_reason(mechanism, HEADS, 4, 1) is None else 2

    def on_rank(channel: Channel) -> list[Tensor]:
        planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, HEADS, backend="cpu")
        q, k, v, dout = (torch.ones(shards.tokens_local, n, 8) for n in (4, 2, 2, 4))
        out, saved = planned.forward(q, k, v)
        return [out, *planned.backward(dout, saved)]

    padding = shards.index < 0
    assert padding.any()
    for found in zip(*simulate(4, on_rank, inner_size=inner_size), strict=True):
        assert (torch.stack(found)[padding] == 0).all()


@pytest.mark.parametrize("strategy", ["ring", "double_ring", "gather", "fetch", "state"])
def test_plans_and_bytes_at_512_ranks(strategy: str) -> None:
    """Any rank's plan is made without the others, and its bytes follow from the formula: here 1M tokens."""
    mechanism = Lightning() if strategy == "state" else Window(window=1024)
    shards = Shards.build(Rows.packed([1 << 20]), layout="contiguous", degree=512)
    row = 2 * 16 * 2 * 2
    expected = {
        "ring": 511 * 2048 * row,
        "double_ring": 511 * 2048 * row,
        "gather": 511 * 2048 * row,
        "fetch": 1023 * row,
        "state": 511 * HEADS.query * 16 * 16 * 4,
    }
    channel = Unconnected(300, 512, inner_size=8)
    planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, HEADS, backend="cpu")
    assert planned.volume(Sizes.of(torch.bfloat16, 16, 16)).forward == expected[strategy]


def test_the_error_of_a_rank_is_raised_and_the_others_end() -> None:
    def fail(channel: Channel) -> None:
        if channel.rank == 3:
            raise ValueError("rank 3 had enough")
        channel.all_reduce(torch.ones(1), kind="test")

    with pytest.raises(ValueError, match="rank 3 had enough"):
        simulate(8, fail)


def test_channels_for_plans_send_nothing() -> None:
    with pytest.raises(RuntimeError, match="for plans"):
        Unconnected(0, 2).all_reduce(torch.ones(1), kind="test")

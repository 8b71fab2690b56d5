"""What strategies refuse, and how ranks fail when one of them does."""

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.rows import Rows
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, AttentionShape, Heads, Volume
from tests.ranks import RankError, RankPool


@pytest.mark.parametrize(
    ("strategy", "heads", "degree", "message"),
    [
        ("ulysses", Heads(query=6, kv=2), 4, "6 query heads and 2 KV heads .*=4 ranks; these degrees work: 1, 2, 6"),
        ("ulysses", Heads(query=8, kv=8), 16, "these degrees work: 1, 2, 4, 8"),
        ("ulysses", Heads(query=12, kv=6), 4, "these degrees work: 1, 2, 3, 6, 12"),
        ("single", Heads(query=8, kv=8), 2, r"set parallel\.context=1"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(strategy: str, heads: Heads, degree: int, message: str) -> None:
    refusal = STRATEGIES.get(strategy).refusal(Dense(), heads, degree)
    assert refusal is not None
    assert re.search(message, refusal), refusal


def test_volumes_by_hand() -> None:
    """64:8 heads of 128 in bfloat16, 8192 tokens on each of 8 ranks: the published comparison, in bytes."""
    shape = AttentionShape(tokens_local=8192, heads=Heads(query=64, kv=8), head_dim=128, value_dim=128, element_bytes=2)
    mib = 2**20
    assert STRATEGIES.get("ring").volume(shape, 8) == Volume(forward=224 * mib, backward=(224 + 512) * mib)
    assert STRATEGIES.get("ulysses").volume(shape, 8) == Volume(forward=252 * mib, backward=252 * mib)
    assert STRATEGIES.get("ulysses").volume(shape, 16).forward == 300 * mib
    for name in STRATEGIES:
        assert STRATEGIES.get(name).volume(shape, 1) == Volume(forward=0, backward=0)


def die_before_the_shift() -> None:
    channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
    if channel.rank == 1:
        raise RuntimeError("rank 1 had enough")
    channel.shift(torch.zeros(4), kind="test", tag=1).wait()


def test_a_rank_that_fails_is_reported_and_the_next_test_has_a_fresh_world(ranks: Callable[[int], RankPool]) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 had enough"):
        ranks(2).run(die_before_the_shift)
    assert time.monotonic() - start < 30
    assert ranks(2).run(dist.get_rank) == [0, 1]


def two_transfers_at_once() -> list[float]:
    """Different tags do not take each other's messages, whatever the order of waiting."""
    channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
    first = channel.shift(torch.full((3,), channel.rank * 10.0), kind="a", tag=1)
    second = channel.shift(torch.full((5,), channel.rank * 100.0), kind="b", tag=2)
    received = [second.wait()[0].item(), first.wait()[0].item()]
    sent = channel.traffic.take()
    assert channel.traffic.take() == {}
    return [*received, sent["a"], sent["b"]]


def test_shifts_go_round_the_ring_and_are_counted(ranks: Callable[[int], RankPool]) -> None:
    found = ranks(4).run(two_transfers_at_once)
    assert found == [[(rank - 1) % 4 * 100.0, (rank - 1) % 4 * 10.0, 12, 20] for rank in range(4)]


def sums_of_bfloat16_parts(strategy: str) -> dict[str, bool]:
    """Whether each gradient that leaves the strategy is float32 and holds more than bfloat16 can."""
    channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
    shards = Shards.deal(Rows.packed([160]), layout="zigzag", degree=channel.size)
    heads = Heads(query=8, kv=2)
    planned = STRATEGIES.get(strategy)(channel).prepare(Dense(), shards, heads, backend="cpu")
    generator = torch.Generator().manual_seed(channel.rank)
    q, k, v, dout = (torch.randn(shards.tokens_local, n, 16, generator=generator).bfloat16() for n in (8, 2, 2, 8))
    _, saved = planned.forward(q, k, v)
    gradients = planned.backward(dout, saved)
    return {
        name: g.dtype == torch.float32 and bool((g != g.bfloat16().float()).float().mean() > 0.1)
        for name, g in zip(("dq", "dk", "dv"), gradients, strict=True)
    }


def test_sums_over_ranks_are_float32(ranks: Callable[[int], RankPool]) -> None:
    """Ring: every gradient is a sum over chunks. Ulysses: dk and dv are sums over the replicas of a KV head."""
    for found in ranks(4).run(sums_of_bfloat16_parts, "ring"):
        assert found == {"dq": True, "dk": True, "dv": True}
    for found in ranks(4).run(sums_of_bfloat16_parts, "ulysses"):
        assert found == {"dq": False, "dk": True, "dv": True}

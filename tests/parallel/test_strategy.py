"""What strategies refuse, and how ranks fail when one of them does."""

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.comm import Channel, Traffic
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

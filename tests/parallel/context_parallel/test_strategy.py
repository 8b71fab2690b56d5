"""What strategies refuse and send, and in which order they send and compute."""

import os
import re
import threading
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.parallel.comm import Channel, GradCommDtype, Traffic, Unconnected
from farspan.parallel.context_parallel import moving_kv
from farspan.parallel.context_parallel.strategies import ship
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Sizes, Volume
from farspan.parallel.layout import Shards
from tests.support.matrix import inner_size_for
from tests.support.processes import alive, wait_for
from tests.support.rank_pool import COLLECTIVE_TIMEOUT_S, RankError, RankPool, world_channel
from tests.support.recording_channel import RecordingChannel
from tests.support.simulation import simulate


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
    unsupported_reason = STRATEGIES.get(strategy).unsupported_reason(Dense(), heads, degree)
    assert unsupported_reason is not None
    assert re.search(message, unsupported_reason), unsupported_reason


def volume(
    strategy: str, degree: int, *, inner_size: int = 1, grad_comm_dtype: GradCommDtype = "accumulation"
) -> Volume:
    """Of the first rank: 64:8 heads of 128 in bfloat16, 8192 tokens on each rank, one document."""
    shards = Shards.build(Rows.packed([8192 * degree]), layout="contiguous", degree=degree)
    channel = Unconnected(0, degree, inner_size=inner_size)
    planner = STRATEGIES.get(strategy)(channel, grad_comm_dtype=grad_comm_dtype)
    planned = planner.prepare(Dense(), shards, Heads(query=64, kv=8), backend="cpu")
    return planned.volume(Sizes.of(torch.bfloat16, 128, 128))


MIB = 2**20


@pytest.mark.parametrize(
    ("strategy", "degree", "inner_size", "grad_comm_dtype", "forward", "backward"),
    [
        # A chunk is 32 MiB, and its gradient 64.
        ("ring", 8, 1, "accumulation", 224, 224 + 512),
        ("ring", 8, 1, "compute", 224, 224 + 224),
        ("double_ring", 8, 4, "accumulation", 224, 224 + 512),
        ("double_ring", 8, 4, "compute", 224, 224 + 224),
        ("gather", 8, 1, "accumulation", 224, 224 + 448),
        ("gather", 8, 1, "compute", 224, 224 + 224),
        # All other ranks read the first one's keys, and it reads none of theirs.
        ("fetch", 8, 1, "accumulation", 224, 224),
        ("ulysses", 8, 1, "accumulation", 252, 252),
        # Of 16 ranks two have each KV head: its gradient moves in float32.
        ("ulysses", 16, 1, "accumulation", 300, 360),
        ("ulysses", 16, 1, "compute", 300, 300),
        # The published figures for 8 x 2: 252 within, 32 between; a chunk of all eight ranks' tokens of one head.
        ("hybrid", 16, 8, "accumulation", 252 + 32, 252 + 32 + 2 * 64),
        # Two of 16 have each KV head, and their chunks are twice as long: both kinds of gradients may be rounded.
        ("hybrid", 32, 16, "accumulation", 300 + 64, 360 + 64 + 2 * 128),
        ("hybrid", 32, 16, "compute", 300 + 64, 300 + 64 + 64),
    ],
)
def test_volumes_by_hand(
    strategy: str, degree: int, inner_size: int, grad_comm_dtype: GradCommDtype, forward: int, backward: int
) -> None:
    found = volume(strategy, degree, inner_size=inner_size, grad_comm_dtype=grad_comm_dtype)
    assert found == Volume(forward=forward * MIB, backward=backward * MIB)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_one_rank_sends_nothing(strategy: str) -> None:
    if STRATEGIES.get(strategy).unsupported_reason(Dense(), Heads(query=64, kv=8), 1) is None:
        assert volume(strategy, 1) == Volume(forward=0, backward=0)


KINDS = {
    "ring": ({"ring_kv"}, {"ring_kv", "ring_dkv"}),
    "gather": ({"gather_kv"}, {"gather_kv", "gather_dkv"}),
    "fetch": ({"fetch_kv"}, {"fetch_kv", "fetch_dkv"}),
    "ulysses": ({"ulysses_qkv", "ulysses_out"}, {"ulysses_dout", "ulysses_dq", "ulysses_dkv"}),
}


def planned(strategy: str, degree_of_shards: int, heads: Heads, channel: Channel | None = None) -> DistributedAttention:
    mechanism = {"state": Lightning(), "ship": MoBA(block=8, top_k=2)}.get(strategy, Dense())
    channel = channel or world_channel(inner_size_for(strategy, degree_of_shards, turn=0))
    shards = Shards.build(Rows.packed([24]), layout="contiguous", degree=degree_of_shards)
    return STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="cpu")


def kinds_of_bytes(strategy: str) -> tuple[set[str], set[str]]:
    channel = world_channel()
    q, k = torch.ones(12, 4, 8), torch.ones(12, 2, 8)
    attend = planned(strategy, 2, Heads(query=4, kv=2), channel)
    _, saved = attend.forward(q, k, k)
    forward = set(channel.traffic.take().sent)
    attend.backward(q, saved)
    return forward, set(channel.traffic.take().sent)


@pytest.mark.parametrize("strategy", list(KINDS))
def test_bytes_are_counted_under_what_they_carry(ranks: Callable[[int], RankPool], strategy: str) -> None:
    assert ranks(2).run(kinds_of_bytes, strategy) == [KINDS[strategy]] * 2


def refusals_of_inputs(strategy: str, degree: int) -> list[str]:
    """On each rank: the messages of the planned attention for inputs that do not fit."""
    attend = planned(strategy, degree, Heads(query=4, kv=2))
    rows = 24 // degree
    good = {"q": torch.ones(rows, 4, 8), "k": torch.ones(rows, 2, 8), "v": torch.ones(rows, 2, 6)}
    attend(**good)
    bad = [
        {"k": torch.ones(rows + 1, 2, 8), "v": torch.ones(rows + 1, 2, 6)},
        {"v": torch.ones(rows, 1, 6)},
        {"q": torch.ones(rows, 2, 8)},
        {"q": torch.ones(rows, 4, 4)},
        {"v": torch.ones(rows, 2, 6).double()},
    ]
    messages = []
    for changes in bad:
        with pytest.raises(ValueError, match="attention") as error:
            attend(**(good | changes))
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_inputs_that_do_not_fit_the_plan_are_refused(ranks: Callable[[int], RankPool], strategy: str) -> None:
    degree = 1 if strategy == "single" else 4
    for messages in ranks(degree).run(refusals_of_inputs, strategy, degree):
        for message in messages[:-1]:
            assert f"q [{24 // degree}, 4] x D" in message, message
        assert "got torch.float32, torch.float32 and torch.float64" in messages[-1]


def test_routing_that_does_not_fit_the_plan_is_refused() -> None:
    """Its numbers are as wide as sums, whatever the dtype of keys."""
    shards = Shards.build(Rows.packed([24]), layout="contiguous", degree=1)
    planning = STRATEGIES.get("single")(Unconnected(0, 1))
    q, k, good = torch.ones(24, 4, 8).bfloat16(), torch.ones(24, 2, 8).bfloat16(), torch.ones(24, 2, 1)
    attend = planning.prepare(MoSA(), shards, Heads(query=4, kv=2), backend="cpu")
    attend(q, k, k, good)
    for bad in ((), (good.bfloat16(),), (good[:23],), (good, good)):
        with pytest.raises(ValueError, match=r"torch\.float32 \[24, 2, 1\]; got"):
            attend(q, k, k, *bad)
    with pytest.raises(ValueError, match=r"nothing; got torch\.float32 \[24, 2, 1\]"):
        planning.prepare(Dense(), shards, Heads(query=4, kv=2), backend="cpu")(q, k, k, good)


def test_plans_that_cannot_be_made_are_refused() -> None:
    for strategy in ("ring", "ulysses"):
        with pytest.raises(ValueError, match="3 ranks cannot run on 2"):
            planned(strategy, 3, Heads(query=4, kv=2), Unconnected(0, 2))
    with pytest.raises(ConfigError, match="these degrees work: 1, 3"):
        planned("ulysses", 2, Heads(query=3, kv=3), Unconnected(0, 2))


def events(
    strategy: str, mechanism: Mechanism, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """Return what rank 2 of 3 does forward and backward, in order; `module` calls its attention."""
    channel = RecordingChannel(2, 3)

    def recorded(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            channel.events.append("compute")
            return function(*arguments, **options)

        return call

    for name in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    shards = Shards.build(Rows.packed([24]), layout="contiguous", degree=3)
    heads = Heads(query=4, kv=2)
    planning = STRATEGIES.get(strategy)(channel)  # pyright: ignore[reportArgumentType]
    attend = planning.prepare(mechanism, shards, heads, backend="cpu")
    q, k = torch.ones(8, 4, 8), torch.ones(8, 2, 8)
    _, saved = attend.forward(q, k, k)
    forward = channel.events.copy()
    channel.events.clear()
    attend.backward(q, saved)
    return forward, channel.events


def test_ring_computes_while_chunks_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = events("ring", Dense(), moving_kv, monkeypatch)
    hop = ["send ring_kv", "compute", "wait ring_kv"]
    assert forward == [*hop, *hop, "compute"]
    first = ["send ring_kv", "compute", "send ring_dkv", "wait ring_kv"]
    second = ["send ring_kv", "compute", "wait ring_dkv", "send ring_dkv", "wait ring_kv"]
    assert backward == [*first, *second, "compute", "wait ring_dkv", "send ring_dkv", "wait ring_dkv"]


def test_fetch_computes_while_the_next_stage_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = events("fetch", Dense(), moving_kv, monkeypatch)
    stage = ["send fetch_kv", "compute", "wait fetch_kv"]
    assert forward == [*stage, *stage, "compute"]
    second = ["send fetch_kv", "compute", "send fetch_dkv", "wait fetch_kv"]
    assert backward == [*stage, *second, "compute", "wait fetch_dkv", "send fetch_dkv", "wait fetch_dkv"]


def test_ship_computes_the_local_part_while_queries_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = events("ship", MoBA(block=4, top_k=3), ship, monkeypatch)
    choice = ["send ship_choice", "wait ship_choice"]
    assert forward == [
        *choice,
        *choice,
        "send ship_q",
        "compute",
        "wait ship_q",
        "compute",
        "send ship_out",
        "wait ship_out",
    ]
    queries = ["send ship_dout", "send ship_lse", "compute", "wait ship_dout", "wait ship_lse"]
    assert backward == [*queries, "compute", "send ship_dq", "wait ship_dq"]


def die_before_the_shift() -> None:
    channel = world_channel()
    if channel.rank == 1:
        raise RuntimeError("rank 1 fails")
    channel.shift(torch.zeros(4), kind="test", tag=1).wait()


def test_a_rank_that_fails_is_reported_and_the_next_test_has_a_fresh_world(ranks: Callable[[int], RankPool]) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 fails"):
        ranks(2).run(die_before_the_shift)
    assert time.monotonic() - start < COLLECTIVE_TIMEOUT_S, "the other rank was waited for"
    assert ranks(2).run(dist.get_rank) == [0, 1]


def die_soon() -> int:
    if dist.get_rank() == 1:
        threading.Timer(0.1, os._exit, args=[1]).start()
    return os.getpid()


def test_a_rank_that_dies_between_calls_is_reported_and_the_next_world_is_fresh() -> None:
    with RankPool(2) as pool:
        pids = pool.run(die_soon)
        wait_for(lambda: not alive(pids[1]), "the death of rank 1")
        with pytest.raises(RankError, match="died"):
            pool.run(dist.get_rank)
        assert pool.run(dist.get_rank) == [0, 1]


def two_transfers_at_once() -> list[float]:
    """Tags keep messages apart, whatever the order of waiting."""
    channel = world_channel()
    first = channel.shift(torch.full((3,), channel.rank * 10.0), kind="a", tag=1)
    second = channel.shift(torch.full((5,), channel.rank * 100.0), kind="b", tag=2)
    received = [second.wait()[0].item(), first.wait()[0].item()]
    traffic = channel.traffic.take()
    assert channel.traffic.take() == Traffic()
    assert traffic.sent == traffic.received
    return [*received, traffic.sent["a"], traffic.sent["b"]]


def test_shifts_go_round_the_ring_and_are_counted(ranks: Callable[[int], RankPool]) -> None:
    found = ranks(4).run(two_transfers_at_once)
    assert found == [[(rank - 1) % 4 * 100.0, (rank - 1) % 4 * 10.0, 12, 20] for rank in range(4)]


ROWS = [[2, 0, 5], [1, 4, 0], [3, 6, 7]]
"""By the rank that sends and the one that receives."""


def one_of_each_transfer(channel: Channel) -> Traffic:
    sent, received = ROWS[channel.rank], [row[channel.rank] for row in ROWS]
    channel.start_all_to_all(torch.zeros(sum(sent), 3), sent=sent, received=received, kind="rows").wait()
    channel.all_to_all(torch.zeros(3, 2), kind="row")
    channel.all_gather(torch.zeros(5), kind="gather")
    channel.all_reduce(torch.zeros(6), kind="reduce")
    channel.shift(torch.zeros(7), kind="shift", tag=1).wait()
    return channel.traffic


def test_bytes_are_counted_where_they_leave_and_where_they_arrive() -> None:
    """Rows of 12 bytes; what stays on its rank does not count."""
    leave, arrive = (5, 1, 9), (4, 6, 5)
    for rank, traffic in enumerate(simulate(3, one_of_each_transfer)):
        even = {"row": 16, "gather": 40, "reduce": 32, "shift": 28}
        assert traffic.sent == {"rows": 12 * leave[rank], **even}
        assert traffic.received == {"rows": 12 * arrive[rank], **even}


def sums_of_bfloat16_parts(strategy: str) -> dict[str, bool]:
    """Whether each gradient that leaves the strategy is float32 and holds more than bfloat16 can."""
    channel = world_channel()
    shards = Shards.build(Rows.packed([160]), layout="zigzag", degree=channel.size)
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

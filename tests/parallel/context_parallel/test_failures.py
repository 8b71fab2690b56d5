"""A rank that fails or hangs: every other rank raises soon, and names what it waited for."""

import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.parallel.comm import Channel, PeerError, Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from tests.support.rank_pool import COLLECTIVE_TIMEOUT_S, RankError, RankPool, world_channel


def attend(strategy: str, mechanism: Mechanism, fault: str, folder: Path) -> None:
    """On a rank: attend, with a fault on rank 1; write the error to a file and exit, as the process of a job would."""
    channel = world_channel()
    rank = channel.rank
    shards = Shards.build(Rows.packed([96]), layout="contiguous", degree=channel.size)
    heads = Heads(query=4, kv=2)
    planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="cpu")
    if fault == "death" and rank == 1:
        os._exit(1)
    tokens = shards.tokens_local + (fault == "shape" and rank == 1)
    q, k, v = (torch.ones(tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    try:
        planned(q, k, v).sum().backward()
    except (PeerError, ValueError) as error:
        (folder / str(rank)).write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize("fault", ["shape", "death"])
@pytest.mark.parametrize(
    ("strategy", "mechanism", "kinds"),
    [
        ("ring", Dense(), "ring_d?kv"),
        ("gather", Dense(), "gather_kv"),
        ("fetch", Dense(), "fetch_d?kv"),
        ("ulysses", Dense(), "ulysses_qkv"),
        # Routed mechanisms fail in the all-reduce of their choice.
        ("fetch", MoBA(block=8, top_k=2), "fetch_choice"),
    ],
    ids=str,
)
def test_every_rank_raises_when_one_is_gone(
    strategy: str, mechanism: Mechanism, kinds: str, fault: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with RankPool(4) as pool, pytest.raises(RankError, match="the process died"):
        pool.run(attend, strategy, mechanism, fault, tmp_path, grace_s=COLLECTIVE_TIMEOUT_S)
    assert time.monotonic() - start < COLLECTIVE_TIMEOUT_S
    errors = {int(file.name): file.read_text() for file in tmp_path.iterdir()}
    if fault == "shape":
        assert "q [24, 4] x D" in errors.pop(1)
    assert sorted(errors) == [0, 2, 3]
    for rank, error in errors.items():
        assert re.match(f"rank {rank} gave up waiting for '{kinds}'", error), error


def wait_for_one_that_hangs() -> str:
    group = dist.new_group(timeout=timedelta(seconds=4))
    channel = Channel(group, Traffic())  # pyright: ignore[reportArgumentType]
    if channel.rank == 1:
        time.sleep(9)
        return "slept"
    try:
        channel.shift(torch.ones(4), kind="ring_kv", tag=1).wait()
        channel.all_reduce(torch.ones(4), kind="ring_choice")
    except PeerError as error:
        return str(error)
    return ""


def test_a_rank_that_hangs_is_given_up_after_the_timeout() -> None:
    start = time.monotonic()
    with RankPool(3) as pool:
        found = pool.run(wait_for_one_that_hangs)
        assert time.monotonic() - start < COLLECTIVE_TIMEOUT_S
    assert found[1] == "slept"
    # The wait for the transfer raises, not the all-reduce after it.
    assert found[2].startswith("rank 2 gave up waiting for 'ring_kv'"), found
    for rank in (0, 2):
        assert found[rank].startswith(f"rank {rank} gave up waiting for 'ring_"), found
        assert "parallel.timeout_s" in found[rank]

"""Rings within a ring: which rank has which chunk at each step, and by which process group it comes."""

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.planner import Heads
from farspan.parallel.comm import GradCommDtype, Traffic
from farspan.parallel.context_parallel.strategies.ring import RingTopology
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from farspan.parallel.mesh import Mesh, ParallelConfig
from tests.support.rank_pool import Pools

SHAPES = [(1, 1), (4, 4), (4, 2), (4, 1), (8, 2), (8, 4), (12, 3), (512, 8)]


@pytest.mark.parametrize(("size", "inner_size"), SHAPES)
def test_every_rank_has_every_chunk_once_and_every_chunk_one_rank(size: int, inner_size: int) -> None:
    ring = RingTopology(size=size, inner_size=inner_size)
    for rank in range(0, size, max(size // 8, 1)):
        assert sorted(ring.owner_at(rank, step) for step in range(size)) == list(range(size))
    for step in range(0, size, max(size // 8, 1)):
        assert sorted(ring.owner_at(rank, step) for rank in range(size)) == list(range(size))
        assert all(ring.rank_with_chunk(ring.owner_at(rank, step), step) == rank for rank in range(size))


def test_a_chunk_crosses_node_groups_once_a_round() -> None:
    """8 ranks in pairs: the chunk of rank 0 goes to its neighbor, then to the next pair, and returns."""
    ring = RingTopology(size=8, inner_size=2)
    assert [ring.rank_with_chunk(0, step) for step in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert [ring.rank_with_chunk(1, step) for step in range(9)] == [1, 0, 3, 2, 5, 4, 7, 6, 1]
    assert [ring.owner_at(0, step) for step in range(8)] == [0, 1, 6, 7, 4, 5, 2, 3]


def messages_by_group(strategy: str, grad_comm_dtype: GradCommDtype) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank of two pairs: how many messages it sends by each process group, forward and backward."""
    mesh = Mesh.build(ParallelConfig(context=4, context_inner=2), "cpu")
    groups = {"context": mesh.context, "inner": mesh.inner, "outer": mesh.outer, "gradients": mesh.gradients}
    names = {id(group): name for name, group in groups.items()}
    assert len(names) == 4
    shards, sent = Shards.build(Rows.packed([16]), layout="contiguous", degree=4), Counter[str]()
    planned = STRATEGIES.get(strategy)(mesh.context_channel(Traffic()), grad_comm_dtype=grad_comm_dtype)
    attend, exchange = planned.prepare(Dense(), shards, Heads(query=2, kv=2), backend="cpu"), dist.all_to_all_single
    start = dist.batch_isend_irecv

    def noted(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.update([names[id(operations[0].group)]])
        return start(operations)

    def noted_exchange(*args: Any, group: dist.ProcessGroup, **options: Any) -> Any:
        sent.update([names[id(group)]])
        return exchange(*args, group=group, **options)

    with mock.patch.multiple(dist, batch_isend_irecv=noted, all_to_all_single=noted_exchange):
        q, k, v = (torch.ones(4, 2, 8, requires_grad=True) for _ in range(3))
        out = attend(q, k, v)
        forward = dict(sent)
        sent.clear()
        out.sum().backward()
    return forward, dict(sent)


# A ring of two pairs sends chunks, and gradients. Where heads are split: q, k, v and out; dout, dq, dkv; and a ring of
# two sends a chunk, and backward a chunk and its gradient, which takes a hop more in the dtype of sums.
@pytest.mark.parametrize(
    ("strategy", "grad_comm_dtype", "forward", "backward"),
    [
        ("double_ring", "accumulation", {"inner": 2, "outer": 1}, {"inner": 2, "outer": 1, "gradients": 4}),
        ("double_ring", "compute", {"inner": 2, "outer": 1}, {"inner": 2, "outer": 1, "gradients": 3}),
        ("hybrid", "accumulation", {"inner": 2, "outer": 1}, {"inner": 3, "outer": 3}),
        ("hybrid_outer", "compute", {"outer": 2, "inner": 1}, {"outer": 3, "inner": 2}),
    ],
)
def test_inner_outer_and_gradient_hops_have_process_groups_of_their_own(
    ranks: Pools, strategy: str, grad_comm_dtype: GradCommDtype, forward: dict[str, int], backward: dict[str, int]
) -> None:
    """NCCL sends all of a group in the order posted: none of the three waits for another."""
    for found in ranks(4).run(messages_by_group, strategy, grad_comm_dtype):
        assert found == (forward, backward)

"""Cost model: time, bytes, FLOPs and memory of attention under a strategy, from its own plans; `auto` picks by it.

    time of a pass = max(compute, overlapped transfers) + exposed transfers
    compute        = FLOPs of unmasked pairs of the busiest rank: 2 (D + Dv) per pair forward, 2.5 times that backward

Choices by content are drawn at random, for a long sequence by some of its queries; from such a sample, `fetch` is taken
to require all visible keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.mechanism import SAMPLED, Mechanism
from farspan.kernels.planner import Heads, RoutingSource, Sizes
from farspan.parallel.comm import Channel, GradCommDtype, Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Move, Volume
from farspan.parallel.layout import Shards
from farspan.units import BYTES, readable

BACKWARD_FLOPS = 2.5
"""Backward over forward: five products of a pair instead of two."""
MAX_RANKS = 8
"""Most ranks that are planned: the first, the last and some between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Speeds of one rank. inner, outer: within its node and between nodes."""

    # Of attention.
    flops_per_s: float
    inner_bytes_per_s: float
    outer_bytes_per_s: float
    # Neighboring ranks that share a node.
    node_ranks: int

    def seconds(self, num_bytes: int, channel: Channel, context: Channel) -> float:
        """Return how long a rank sends bytes over a channel: the context channel, or one of its axes."""
        # Any transfer over the outer axis leaves the node, however few ranks the axis has.
        span = channel.size if channel is context.inner else context.size
        return num_bytes / (self.inner_bytes_per_s if span <= self.node_ranks else self.outer_bytes_per_s)


MACHINES = {
    "cpu": Machine(flops_per_s=1e11, inner_bytes_per_s=1e9, outer_bytes_per_s=1e9, node_ranks=8),
    "cuda": Machine(flops_per_s=4e14, inner_bytes_per_s=2e11, outer_bytes_per_s=4e10, node_ranks=8),
}
"""Defaults by device type: two CPU cores; H100s with NVLink and a 400 Gb/s port each, eight to a node."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Attention of one layer over one sharded sequence; properties that serve every strategy are computed once."""

    mechanism: Mechanism
    shards: Shards
    heads: Heads
    sizes: Sizes
    # Ranks of a node group, W.
    inner_size: int = 1
    grad_comm_dtype: GradCommDtype = "accumulation"

    @cached_property
    def work(self) -> Tensor:
        """The work of each token, float64 `[tokens]`."""
        return self.mechanism.keys_per_query(self.shards.rows)

    @cached_property
    def flops_per_head(self) -> int:
        """Of the forward pass."""
        return self.mechanism.useful_flops(self.shards.rows, self.sizes.head_dim, self.sizes.value_dim)

    @cached_property
    def routing(self) -> RoutingSource:
        """The routing of some of the queries, for normal inputs."""
        return cache(lambda: self.mechanism.sample_routing(self.shards.rows, self.heads, max_queries=SAMPLED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of some layers for one sequence, forward and backward. volume, working_bytes: the maximum over ranks."""

    volume: Volume
    # Forward, of the busiest rank.
    flops: float
    # FLOPs of the busiest rank over the mean.
    balance: float
    working_bytes: int
    compute_s: float
    overlapped_s: float
    exposed_s: float
    seconds: float

    def __str__(self) -> str:
        moved = readable(self.volume.forward + self.volume.backward, BYTES)
        seconds = (self.seconds, self.compute_s, self.overlapped_s, self.exposed_s)
        total, compute, overlapped, exposed = (f"{1e3 * s:,.{0 if s > 0.1 else 2}f}" for s in seconds)
        transfers = f"transfers {overlapped} overlapped, {exposed} exposed, {moved}"
        return f"{total} ms (compute {compute}; {transfers})"


def total_cost(costs: Sequence[tuple[Cost, int]]) -> Cost:
    """Sum pairs of a cost and the number of layers that have it."""
    flops = sum(cost.flops * layers for cost, layers in costs)
    mean = sum(cost.flops / cost.balance * layers for cost, layers in costs if cost.flops)
    return Cost(
        volume=Volume.total([cost.volume for cost, layers in costs for _ in range(layers)]),
        flops=flops,
        balance=flops / mean if flops else 1.0,
        working_bytes=max(cost.working_bytes for cost, _ in costs),
        compute_s=sum(cost.compute_s * layers for cost, layers in costs),
        overlapped_s=sum(cost.overlapped_s * layers for cost, layers in costs),
        exposed_s=sum(cost.exposed_s * layers for cost, layers in costs),
        seconds=sum(cost.seconds * layers for cost, layers in costs),
    )


def strategy_for(name: str, mechanism: Mechanism, heads: Heads, degree: int, inner: int) -> str:
    """Return the strategy of a mechanism where `name` is configured: that one, or the fallback that supports it."""
    fallback, layer = STRATEGIES.get(name).fallback_strategy, (mechanism, heads, degree, inner)
    if fallback is None or STRATEGIES.get(name).unsupported_reason(*layer) is None:
        return name
    return fallback if STRATEGIES.get(fallback).unsupported_reason(*layer) is None else name


def predict(strategy: str, job: Job, machine: Machine) -> Cost:
    """Return the cost of a strategy; raises ConfigError where it does not support the job."""
    degree, cls = job.shards.degree, STRATEGIES.get(strategy)
    planned = []
    for rank in torch.linspace(0, degree - 1, min(degree, MAX_RANKS)).round().long().tolist():
        channel = Unconnected(rank, degree, inner_size=job.inner_size)
        planner = cls(channel, grad_comm_dtype=job.grad_comm_dtype)
        planned.append(planner.prepare(job.mechanism, job.shards, job.heads, backend="reference"))
    shares = [_share_of_work(attention, job.work, job.heads.query) for attention in planned]
    flops = max(shares) * job.flops_per_head * job.heads.query
    moves = [attention.moves(job.sizes, job.routing) for attention in planned]
    times = [_times(of, attention.channel, machine, flops) for of, attention in zip(moves, planned, strict=True)]
    volumes = [Volume.total(of_rank) for of_rank in moves]
    return Cost(
        volume=Volume(forward=max(v.forward for v in volumes), backward=max(v.backward for v in volumes)),
        flops=flops,
        balance=max(shares) * degree,
        working_bytes=max(attention.working_bytes(job.sizes, job.routing) for attention in planned),
        **max(times, key=lambda time: time["seconds"]),
    )


def compare(layers: Sequence[tuple[Job, int]], machine: Machine) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return the cost of each strategy, the best first, and for the others why they do not support the layers.

    layers: jobs, and how many layers have each. The best is the fastest or, of those within 2 % of it, the one with the
    least memory.
    """
    costs, refusals = {}, {}
    # A fallback is that of several strategies.
    predicted = cache(lambda name, job: predict(name, job, machine))
    for name in STRATEGIES:
        names = [strategy_for(name, job.mechanism, job.heads, job.shards.degree, job.inner_size) for job, _ in layers]
        if name not in names:
            # Only fallbacks would run: report why it supports no layer.
            names = [name] * len(layers)
        try:
            costs[name] = total_cost(
                [(predicted(one, job), count) for one, (job, count) in zip(names, layers, strict=True)]
            )
        except ConfigError as error:
            refusals[name] = str(error)
    fastest = min((cost.seconds for cost in costs.values()), default=0.0)
    best = sorted(costs, key=lambda name: (max(costs[name].seconds, 1.02 * fastest), costs[name].working_bytes))
    return {name: costs[name] for name in best}, refusals


def _times(moves: Sequence[Move], context: Channel, machine: Machine, flops: float) -> dict[str, float]:
    """Return the times of a rank, as `Cost` names them."""
    # [forward, backward] each: transfers of one pass overlap with that pass only.
    compute = [flops / machine.flops_per_s, flops * BACKWARD_FLOPS / machine.flops_per_s]
    overlapped, exposed = [0.0, 0.0], [0.0, 0.0]
    for move in moves:
        transfers = overlapped if move.overlapped else exposed
        for direction, sent in enumerate((move.forward, move.backward)):
            transfers[direction] += machine.seconds(sent, move.channel, context)
    seconds = sum(max(a, b) + c for a, b, c in zip(compute, overlapped, exposed, strict=True))
    return {
        "compute_s": sum(compute),
        "overlapped_s": sum(overlapped),
        "exposed_s": sum(exposed),
        "seconds": seconds,
    }


def _share_of_work(attention: DistributedAttention, work: Tensor, heads: int) -> float:
    """Return this rank's share of all work; work: of each token, the same for all of its `heads`."""
    tokens = attention.queries.tokens
    return float(work[tokens[tokens >= 0]].sum() / work.sum().clamp(min=1)) * attention.queries.heads / heads

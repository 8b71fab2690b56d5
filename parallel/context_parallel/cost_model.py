"""Cost model: time, bytes, FLOPs and memory of attention under a strategy, from its own plans; `auto` picks by it.

Time of a pass: what moves hidden behind computing takes no time unless it is longer; what is exposed is added. FLOPs
are those of visible pairs, 2 (D + Dv) forward and 2.5 times that backward; the busiest rank counts. What is chosen by
content is drawn; of a long sequence by some of its queries, and `fetch` is then taken to need all that they may choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, Routing, Sizes
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Move, Volume
from farspan.parallel.layout import Shards
from farspan.parallel.simulation import Unconnected

BACKWARD_FLOPS = 2.5
"""Of the backward pass over the forward pass: five products of a pair instead of two."""
MOST_RANKS = 8
"""Ranks that are planned for: the first, the last and some between; the busiest of them counts."""
SAMPLED = 1 << 11
"""Queries whose typical choice is drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What times depend on.

    flops_per_s: of attention, one rank. inner, outer: bytes per second that a rank sends within its node and out of it.
    node_ranks: neighboring ranks that share a node.
    """

    flops_per_s: float
    inner_bytes_per_s: float
    outer_bytes_per_s: float
    node_ranks: int

    def seconds(self, num_bytes: int, channel: Channel, whole: Channel) -> float:
        """Return how long a rank sends bytes over a channel: `whole`, or one of its axes."""
        span = channel.size if channel is whole.inner else whole.size
        return num_bytes / (self.inner_bytes_per_s if span <= self.node_ranks else self.outer_bytes_per_s)


MACHINES = {
    "cpu": Machine(flops_per_s=1e11, inner_bytes_per_s=1e9, outer_bytes_per_s=1e9, node_ranks=8),
    "cuda": Machine(flops_per_s=4e14, inner_bytes_per_s=2e11, outer_bytes_per_s=4e10, node_ranks=8),
}
"""By type of device, for want of better: an H100 with NVLink and one 400 Gb/s port each, eight to a node; two cores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Attention of one layer: a dealt sequence and what attends to it. width: of the inner axis of the ranks.

    What it asks of any strategy is found once.
    """

    mechanism: Mechanism
    shards: Shards
    heads: Heads
    sizes: Sizes
    width: int = 1
    rounded_gradients: bool = False

    @cached_property
    def work(self) -> Tensor:
        """The work of each token, float64 `[tokens]`."""
        return self.mechanism.keys_per_query(self.shards.rows)

    @cached_property
    def flops_per_head(self) -> int:
        """Of the forward pass."""
        rows = self.shards.rows
        return self.mechanism.useful_flops(rows, rows, self.sizes.head_dim, self.sizes.value_dim)

    @cached_property
    def _routing(self) -> Routing:
        return self.mechanism.sample_routing(self.shards.rows, self.heads, max_queries=SAMPLED)

    def routing(self) -> Routing:
        """The routing of some of the queries, for normal inputs."""
        return self._routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of some layers and one sequence, forward and backward. volume, working_bytes: most of any rank.

    flops: forward, of the busiest rank; balance: those over the mean. compute, hidden, exposed: seconds of computing,
    of transfers meanwhile, of other transfers. seconds: in all.
    """

    volume: Volume
    flops: float
    balance: float
    working_bytes: int
    compute_s: float
    hidden_s: float
    exposed_s: float
    seconds: float

    def __str__(self) -> str:
        moved = (self.volume.forward + self.volume.backward) / 2**20
        seconds = (self.seconds, self.compute_s, self.hidden_s, self.exposed_s)
        total, computes, meanwhile, besides = (f"{1e3 * s:,.{0 if s > 0.1 else 2}f}" for s in seconds)
        return f"{total} ms (computes {computes}, sends {meanwhile} meanwhile, {besides} besides; {moved:,.1f} MiB)"


def together(costs: Sequence[tuple[Cost, int]]) -> Cost:
    """Return the cost of all layers, of costs and how many layers have each."""
    flops = sum(cost.flops * layers for cost, layers in costs)
    mean = sum(cost.flops / cost.balance * layers for cost, layers in costs if cost.flops)
    moved = [Volume(forward=c.volume.forward * n, backward=c.volume.backward * n) for c, n in costs]
    return Cost(
        volume=Volume.total(moved),
        flops=flops,
        balance=flops / mean if flops else 1.0,
        working_bytes=max(cost.working_bytes for cost, _ in costs),
        compute_s=sum(cost.compute_s * layers for cost, layers in costs),
        hidden_s=sum(cost.hidden_s * layers for cost, layers in costs),
        exposed_s=sum(cost.exposed_s * layers for cost, layers in costs),
        seconds=sum(cost.seconds * layers for cost, layers in costs),
    )


def strategy_for(name: str, mechanism: Mechanism, heads: Heads, degree: int, inner: int) -> str:
    """Return the strategy that serves a mechanism where `name` is configured: that one, or what stands in for it."""
    fallback_strategy, of_layer = STRATEGIES.get(name).fallback_strategy, (mechanism, heads, degree, inner)
    if fallback_strategy is None or STRATEGIES.get(name).unsupported_reason(*of_layer) is None:
        return name
    return fallback_strategy if STRATEGIES.get(fallback_strategy).unsupported_reason(*of_layer) is None else name


def predict(strategy: str, job: Job, machine: Machine) -> Cost:
    """Return what a strategy would cost; raises ConfigError where it refuses the job."""
    degree, cls = job.shards.degree, STRATEGIES.get(strategy)
    planned = []
    for rank in _spread(degree):
        channel = Unconnected(rank, degree, width=job.width)
        planning = cls(channel, rounded_gradients=job.rounded_gradients)
        planned.append((planning.prepare(job.mechanism, job.shards, job.heads, backend="reference"), channel))
    shares = [_share(attend, job.work, job.heads.query) for attend, _ in planned]
    flops = max(shares) * job.flops_per_head * job.heads.query
    moves = [attend.moves(job.sizes, job.routing) for attend, _ in planned]
    times = [_times(of_rank, whole, machine, flops) for of_rank, (_, whole) in zip(moves, planned, strict=True)]
    volumes = [Volume.total(move.volume for move in of_rank) for of_rank in moves]
    slowest = max(times, key=lambda time: time.seconds)
    return Cost(
        volume=Volume(forward=max(v.forward for v in volumes), backward=max(v.backward for v in volumes)),
        flops=flops,
        balance=max(shares) * degree,
        working_bytes=max(attend.working_bytes(job.sizes, job.routing) for attend, _ in planned),
        hidden_s=slowest.hidden,
        exposed_s=slowest.exposed,
        compute_s=slowest.compute,
        seconds=slowest.seconds,
    )


def compare(layers: Sequence[tuple[Job, int]], machine: Machine) -> tuple[dict[str, Cost], dict[str, str]]:
    """Return what each strategy would cost, the best first, and of others why they refuse.

    layers: jobs, and how many layers have each. The best: the fastest; of those within a fiftieth of it, the one that
    holds least.
    """
    costs, refusals = {}, {}
    for name in STRATEGIES:
        serving = [_serving(name, job) for job, _ in layers]
        # One that serves no layer is no choice.
        names = serving if name in serving else [name] * len(serving)
        try:
            costs[name] = together(
                [(predict(one, job, machine), count) for one, (job, count) in zip(names, layers, strict=True)]
            )
        except ConfigError as error:
            refusals[name] = str(error)
    fastest = min((cost.seconds for cost in costs.values()), default=0.0)
    best = sorted(costs, key=lambda name: (max(costs[name].seconds, 1.02 * fastest), costs[name].working_bytes))
    return {name: costs[name] for name in best}, refusals


def _serving(name: str, job: Job) -> str:
    return strategy_for(name, job.mechanism, job.heads, job.shards.degree, job.width)


@dataclass(frozen=True, slots=True)
class _Times:
    compute: float
    hidden: float
    exposed: float
    seconds: float


def _times(moves: Sequence[Move], whole: Channel, machine: Machine, flops: float) -> _Times:
    compute, hidden, exposed = ([0.0, 0.0] for _ in range(3))
    for direction, name in enumerate(("forward", "backward")):
        compute[direction] = flops * (BACKWARD_FLOPS if direction else 1.0) / machine.flops_per_s
        for move in moves:
            into = hidden if move.hidden else exposed
            into[direction] += machine.seconds(getattr(move.volume, name), move.channel, whole)
    seconds = sum(max(a, b) + c for a, b, c in zip(compute, hidden, exposed, strict=True))
    return _Times(sum(compute), sum(hidden), sum(exposed), seconds)


def _share(attend: DistributedAttention, work: Tensor, heads: int) -> float:
    """Return how much of all work is this rank's; work: of each token, the same for all of its `heads`."""
    mine = attend.queries.tokens
    return float(work[mine[mine >= 0]].sum() / work.sum().clamp(min=1)) * attend.queries.heads / heads


def _spread(degree: int) -> Sequence[int]:
    return torch.linspace(0, degree - 1, min(degree, MOST_RANKS)).round().long().tolist()

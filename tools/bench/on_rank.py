"""Attention over a sequence that is sharded over ranks, and what their processes do with it in benchmarks."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, Routing, Sizes
from farspan.parallel.comm import Channel, Traffic, Transfer
from farspan.parallel.context_parallel.strategy import Queries, Strategy, Volume
from farspan.parallel.layout import Shards
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import Check, outcome
from farspan.tools.bench.contenders import NamedContender, backend_for
from farspan.tools.bench.run import WARM_UP_TOKENS, peaks_of_pass
from farspan.tools.rank_pool import RankPool, grid_groups

WARM_UPS = {"cpu": 0, "cuda": 2}
"""Passes before the first that is timed: a GPU's kernels are compiled for shapes; a CPU is warm from the checks."""
STAMP_TAGS = 1000
"""Added to the tag of a transfer for the message with its start time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardedCase:
    """Attention over a sharded sequence, whose inputs each rank draws for itself."""

    mechanism: Mechanism
    shards: Shards
    shape: Shape

    def inputs(self, rank: int) -> tuple[list[Tensor], Tensor]:
        """Return q, k, v and routing of a rank's rows, leaves that require gradients, and a gradient of its out.

        All are normal, and 0 for padding.
        """
        inputs = inputs_of(self.mechanism, self.shards.tokens_local, self.shape, seed=rank)
        dout = gradient_of_out(self.shards.tokens_local, self.shape)
        with torch.no_grad():
            for x in (*inputs, dout):
                x[self.shards.index[rank] < 0] = 0
        return inputs, dout

    def routing(self) -> Routing:
        """Return the mechanism's routing of the inputs of all ranks."""
        shards = zip(*(self.inputs(rank)[0] for rank in range(self.shards.degree)), strict=True)
        q, k, _, *of_router = (self.shards.unshard(torch.stack(parts).detach()) for parts in shards)
        return self.mechanism.route(self.shards.rows, self.shape.heads, q, k, *of_router)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Attention of a case as it is called on one rank.

    queries: those that the rank attends with. traffic: counts what it sends, while `counting`; None: nothing does.
    volume: the formula of what it sends; None: there is none. scope: entered for every pass.
    """

    case: ShardedCase
    attention: Attention
    queries: Queries
    traffic: Traffic | None = None
    volume: Callable[[], Volume] | None = None
    counting: Callable[[], AbstractContextManager[object]] = nullcontext
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


class ContextContender(NamedContender):
    """One way of computing attention over ranks."""

    @abstractmethod
    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        """Return why it cannot compute this, as a sentence, or None if it can."""

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return how many ranks the inner axis of its channel has; 1 if there is none."""
        return 1

    @abstractmethod
    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        """Plan on a rank; all ranks call."""


@final
@dataclass(frozen=True, slots=True)
class StrategyContender(ContextContender):
    """A strategy of farspan, with the fastest backend that can do the work."""

    name: str
    strategy: type[Strategy]
    is_baseline: ClassVar[bool] = False

    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        return self.strategy.unsupported_reason(mechanism, heads, degree, self.width(mechanism, heads, degree))

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return the first that the strategy takes: strategies of two levels want a grid."""
        widths = [width for width in range(1, degree) if degree % width == 0]
        able = (width for width in widths if self.strategy.unsupported_reason(mechanism, heads, degree, width) is None)
        return next(able, 1)

    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        shape, backend = case.shape, backend_for(case.mechanism, case.shape)
        attend = self.strategy(channel).prepare(case.mechanism, case.shards, shape.heads, backend=backend)
        volume = partial(attend.volume, Sizes.of(shape.dtype, shape.head_dim, shape.value_dim), case.routing)
        return Planned(case=case, attention=attend, queries=attend.queries, traffic=channel.traffic, volume=volume)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextRow:
    """A row of the tables. threads: of each rank; more than one only where a single rank is compared with several."""

    contender: ContextContender
    case: Case
    layout: str
    degree: int
    threads: int = 1

    @property
    def strategy(self) -> str:
        """The name of the contender; rows of one rank add how many threads it has."""
        return self.contender.name if self.threads == 1 else f"{self.contender.name}_{self.threads}_threads"

    @property
    def setting(self) -> str:
        return f"{self.strategy}, {self.layout}, {self.degree} rank{'s' if self.degree > 1 else ''}"

    @property
    def name(self) -> str:
        return f"{self.case.name} by {self.setting}"

    def shards(self, mechanism: Mechanism, rows: Rows) -> Shards:
        return Shards.build(rows, layout=self.layout, degree=self.degree, work=mechanism.keys_per_query)


class DelayedChannel(Channel):
    """A channel whose transfers to a neighbor take longer, as over a slower network; senders do not wait.

    It is of one machine, whose ranks share a clock; senders also send their start time, which is not counted.
    delay_s: a transfer completes no earlier than so long after its sender started it.
    """

    delay_s: float = 0.0

    def _shift(self, buffer: Tensor, tag: int, to: int, source: int, kind: str) -> Transfer:
        if not self.delay_s:
            return super()._shift(buffer, tag, to, source, kind)
        now = torch.tensor([time.monotonic()], dtype=torch.float64)
        started = super()._shift(now, STAMP_TAGS + tag, to, source, kind)
        return DelayedTransfer(super()._shift(buffer, tag, to, source, kind), started, self.delay_s)


class DelayedTransfer(Transfer):
    """A transfer, and a second one with the start time of its sender."""

    def __init__(self, transfer: Transfer, started: Transfer, delay_s: float) -> None:
        self.transfer, self.started, self.delay_s = transfer, started, delay_s

    def wait(self) -> Tensor:
        received, started = self.transfer.wait(), self.started.wait()
        time.sleep(max(float(started) + self.delay_s - time.monotonic(), 0.0))
        return received


Prepared = tuple[Planned, list[Tensor], Tensor]
"""With the inputs of a pass, and the gradient of its out."""


class Worker:
    """A rank process and what it keeps between calls. prepared: passes by row and size."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device, self.traffic = ranks, device, Traffic()
        self.prepared: dict[str, Prepared] = {}
        self.channels: dict[int, DelayedChannel] = {}

    def channel(self, width: int) -> DelayedChannel:
        """Return the channel of all ranks, a grid if `width`, the ranks of its inner axis, is more than 1."""
        if width not in self.channels:
            inner = outer = None
            if width > 1:
                inner, outer = (DelayedChannel(axis, self.traffic) for axis in grid_groups(width))
            world = dist.group.WORLD
            assert world is not None
            self.channels[width] = DelayedChannel(world, self.traffic, inner=inner, outer=outer)
        return self.channels[width]

    def delay_transfers(self, delay_s: float) -> None:
        for channel in self.channels.values():
            for of_ring in (channel, channel.inner, channel.outer):
                if isinstance(of_ring, DelayedChannel):
                    of_ring.delay_s = delay_s

    def align(self) -> None:
        """Wait until all ranks have come so far, and this one's GPU is done."""
        if self.ranks.world_size > 1:
            arrived = torch.zeros(1, device=self.device)
            dist.all_reduce(arrived)
            arrived.item()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for this rank's GPU, if it has one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def plan(self, row: ContextRow, mechanism: Mechanism, rows: Rows, shape: Shape) -> Planned:
        shards, shape = row.shards(mechanism, rows), replace(shape, device=self.device)
        case = ShardedCase(mechanism=mechanism, shards=shards, shape=shape)
        width = row.contender.width(mechanism, shape.heads, row.degree)
        return row.contender.plan(case, self.channel(width))

    def prepare(self, row: ContextRow, tokens: int, shape: Shape) -> Prepared:
        planned = self.plan(row, row.case.mechanism, row.case.rows(tokens), shape)
        return planned, *planned.case.inputs(self.ranks.rank)


def worker_pool(size: int, threads: int, device: str) -> RankPool:
    """Return a pool whose ranks pass a Worker to each call. device: the kind; each rank has a GPU of its own."""
    return RankPool(size, partial(_join, threads, device), preload=__name__)


@contextmanager
def _join(threads: int, kind: str, ranks: Ranks, store: dist.Store) -> Iterator[tuple[Worker]]:  # pyright: ignore[reportPrivateImportUsage]
    torch.set_num_threads(threads)
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)
    with connected(ranks, device, store=store):
        yield (Worker(ranks, device),)


def check(worker: Worker, row: ContextRow, of: Check) -> list[Tensor]:
    """Return this rank's rows of out and of the gradients, on the CPU."""
    of = replace(of, shape=replace(of.shape, device=worker.device))
    planned = worker.plan(row, of.mechanism, of.rows, of.shape)
    shards, rank = planned.case.shards, worker.ranks.rank
    inputs = [shards.shard(x.detach(), rank).requires_grad_() for x in of.inputs()]
    with planned.scope():
        return [x.cpu() for x in outcome(planned.attention, inputs, shards.shard(of.gradient(), rank))]


def time_pass(
    worker: Worker, row: ContextRow, tokens: int, shape: Shape, delays_s: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Return the milliseconds of a forward and of a backward pass, each begun when all ranks were ready.

    delays_s: of every transfer to a neighbor, forward and backward.
    """
    key, warm_ups = f"{row.name}, {tokens} tokens", 0
    if key not in worker.prepared:
        worker.prepared[key], warm_ups = worker.prepare(row, tokens, shape), WARM_UPS[worker.device.type]
    with worker.prepared[key][0].scope():
        for _ in range(warm_ups):
            _time(worker, worker.prepared[key], (0.0, 0.0))
        return _time(worker, worker.prepared[key], delays_s)


def _time(worker: Worker, prepared: Prepared, delays_s: tuple[float, float]) -> tuple[float, float]:
    def timed(delay_s: float, work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        worker.align()
        worker.delay_transfers(delay_s)
        begin = perf_counter()
        found = work(*arguments)
        worker.synchronize()
        return found, 1e3 * (perf_counter() - begin)

    planned, inputs, dout = prepared
    out, forward = timed(delays_s[0], planned.attention, *inputs)
    _, backward = timed(delays_s[1], torch.autograd.grad, out, inputs, dout)
    worker.delay_transfers(0.0)
    return forward, backward


def forget(worker: Worker) -> None:
    """Drop all plans and inputs."""
    worker.prepared.clear()


def measure(worker: Worker, row: ContextRow, tokens: int, shape: Shape) -> dict[str, Any]:
    """Measure what a pass needs; the first call of a fresh process, as memory freed before hides what is needed.

    peak: bytes above the inputs. sent, formula: bytes, counted and stated; both None where they are unknown. work:
    unmasked pairs of a query head and a key, of this rank's queries; where content decides, all that may be.
    """
    for size in (min(WARM_UP_TOKENS * row.degree, tokens), tokens):  # the first loads libraries and their workspaces
        planned, inputs, dout = worker.prepare(row, size, shape)
        worker.align()
        if planned.traffic is not None:
            planned.traffic.take()
        with planned.scope(), planned.counting():
            peaks = peaks_of_pass(planned.attention, inputs, dout)
    sent = None if planned.traffic is None else planned.traffic.take().sent.total()
    volume = None if planned.volume is None else planned.volume()
    formula = None if volume is None else volume.forward + volume.backward
    keys, queries = planned.case.mechanism.keys_per_query(planned.case.shards.rows), planned.queries
    work = float(keys[queries.tokens[queries.tokens >= 0]].sum()) * queries.heads
    return {"peak": peaks and peaks["fwd_bwd"], "sent": sent, "formula": formula, "work": work}

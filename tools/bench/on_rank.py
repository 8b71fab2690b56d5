"""Rank processes of benchmarks: what a rank keeps between calls, and the calls of the context-parallel benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.comm import Traffic
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.case import Shape
from farspan.tools.bench.check import Check, outcome
from farspan.tools.bench.context_contenders import ContextRow, Planned, ShardedCase
from farspan.tools.bench.delayed import Delay, DelayedChannel
from farspan.tools.bench.memory import WARM_UP_TOKENS, peaks_of_pass, reports_memory
from farspan.tools.rank_pool import RankPool, grid_groups

WARM_UPS = {"cpu": 0, "cuda": 2}
"""Passes before the first that is timed: a GPU's kernels are compiled for shapes; a CPU is warm from the checks."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned pass on one rank with its inputs."""

    case: ShardedCase
    planned: Planned
    inputs: list[Tensor]
    dout: Tensor


class Worker:
    """A rank process and what it keeps between calls. prepared: passes by row and size."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.delay, self.traffic = Delay(), Traffic()
        self.prepared: dict[str, Prepared] = {}
        self._channels: dict[int, DelayedChannel] = {}

    def channel(self, width: int) -> DelayedChannel:
        """Return the channel of all ranks, a grid if `width`, the ranks of its inner axis, is more than 1."""
        if width not in self._channels:
            inner = outer = None
            if width > 1:
                inner, outer = (DelayedChannel(axis, self.traffic, self.delay) for axis in grid_groups(width))
            world = dist.group.WORLD
            assert world is not None
            self._channels[width] = DelayedChannel(world, self.traffic, self.delay, inner=inner, outer=outer)
        return self._channels[width]

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

    def plan(self, row: ContextRow, case: ShardedCase) -> Planned:
        width = row.contender.width(case.mechanism, case.shape.heads, row.degree)
        return row.contender.plan(case, self.channel(width))

    def prepare(self, row: ContextRow, tokens: int, shape: Shape) -> Prepared:
        case, rank = row.sharded(tokens, replace(shape, device=self.device)), self.ranks.rank
        return Prepared(case, self.plan(row, case), case.inputs(rank), case.gradient_of_out(rank))


def worker_pool(size: int, threads: int, device: str) -> RankPool:
    """Return a pool whose ranks pass a Worker to each call. device: the kind; each rank has a GPU of its own."""
    return RankPool(size, partial(_join, threads, device), preload=__name__)


@contextmanager
def _join(threads: int, kind: str, ranks: Ranks, store: dist.Store) -> Iterator[tuple[Worker]]:  # pyright: ignore[reportPrivateImportUsage]
    torch.set_num_threads(threads)
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)
    with connected(ranks, device, store=store):
        yield (Worker(ranks, device),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Measurements of one pass on one rank. peak: bytes above the inputs. sent, formula: bytes, counted and stated.

    work: unmasked pairs of a query head and a key, of this rank's queries; where content decides, all that may be.
    """

    peak: int | None
    sent: int | None
    formula: int | None
    work: float


def check(worker: Worker, row: ContextRow, of: Check) -> list[Tensor]:
    """Return this rank's rows of out and of the gradients, on the CPU."""
    of = replace(of, shape=replace(of.shape, device=worker.device))
    shards, rank = row.shards(of.mechanism, of.rows), worker.ranks.rank
    planned = worker.plan(row, ShardedCase(mechanism=of.mechanism, shards=shards, shape=of.shape))
    inputs = [shards.shard(x.detach(), rank).requires_grad_() for x in of.inputs()]
    with planned.scope():
        found = outcome(planned.attention, inputs, shards.shard(of.gradient(), rank))
    return [x.cpu() for x in found]


def time_pass(
    worker: Worker, row: ContextRow, tokens: int, shape: Shape, delays_s: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Return the milliseconds of a forward and of a backward pass, each begun when all ranks were ready.

    delays_s: of every transfer, forward and backward.
    """
    key = f"{row.name}, {tokens} tokens"
    if key not in worker.prepared:
        worker.prepared[key] = prepared = worker.prepare(row, tokens, shape)
        with prepared.planned.scope():
            for _ in range(WARM_UPS[worker.device.type]):
                _time(worker, prepared, (0.0, 0.0))
    prepared = worker.prepared[key]
    with prepared.planned.scope():
        return _time(worker, prepared, delays_s)


def forget(worker: Worker) -> None:
    """Drop all plans and inputs."""
    worker.prepared.clear()


def measure(worker: Worker, row: ContextRow, tokens: int, shape: Shape) -> Needs:
    """Measure what a pass needs; the first call of a fresh process, as memory freed before hides what is needed."""
    warm_up = worker.prepare(row, min(WARM_UP_TOKENS * row.degree, tokens), shape)
    with warm_up.planned.scope(), warm_up.planned.counting():
        outcome(warm_up.planned.attention, warm_up.inputs, warm_up.dout)  # loads libraries and their workspaces
    prepared = worker.prepare(row, tokens, shape)
    planned, case, peak = prepared.planned, prepared.case, None
    worker.align()
    if planned.traffic is not None:
        planned.traffic.take()
    with planned.scope(), planned.counting():
        if reports_memory(worker.device):
            peak = peaks_of_pass(planned.attention, prepared.inputs, prepared.dout)["fwd_bwd"]
        else:
            outcome(planned.attention, prepared.inputs, prepared.dout)
    sent = None if planned.traffic is None else planned.traffic.take().sent.total()
    volume = None if planned.volume is None else planned.volume(case)
    formula = None if volume is None else volume.forward + volume.backward
    keys, queries = case.mechanism.keys_per_query(case.shards.rows), planned.queries
    work = float(keys[queries.tokens[queries.tokens >= 0]].sum()) * queries.heads
    return Needs(peak=peak, sent=sent, formula=formula, work=work)


def _time(worker: Worker, prepared: Prepared, delays_s: tuple[float, float]) -> tuple[float, float]:
    worker.align()
    worker.delay.seconds, begin = delays_s[0], perf_counter()
    out = prepared.planned.attention(*prepared.inputs)
    worker.synchronize()
    forward = perf_counter() - begin
    worker.align()
    worker.delay.seconds, begin = delays_s[1], perf_counter()
    torch.autograd.grad(out, prepared.inputs, prepared.dout)
    worker.synchronize()
    backward = perf_counter() - begin
    worker.delay.seconds = 0.0
    return 1e3 * forward, 1e3 * backward

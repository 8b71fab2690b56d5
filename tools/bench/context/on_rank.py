"""What ranks do when they are called: attend to what is checked, time a pass, tell what a pass needs."""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.parallel.layout import Shards
from farspan.tools.bench.case import Shape, gradient_of_out
from farspan.tools.bench.context.entrant import Job, Planned, Row
from farspan.tools.bench.context.pool import Here
from farspan.tools.bench.correctness import Check, outcome
from farspan.tools.bench.memory import WARM_UP_TOKENS, peaks_of_pass, tells_memory

WARM_UPS = {"cpu": 0, "cuda": 2}
"""Passes before the first that is timed: a GPU's kernels are compiled for shapes; a CPU is warm from the checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Of one pass on one rank. peak: bytes above the inputs. sent, stated: bytes sent, counted and by the formula.

    work: pairs of a query head and a key that are seen, or may be, by the queries that the rank attends with.
    """

    peak: int | None
    sent: int | None
    stated: int | None
    work: float


@dataclass(frozen=True, slots=True)
class _Prepared:
    job: Job
    planned: Planned
    inputs: list[Tensor]
    dout: Tensor


def check(here: Here, row: Row, of: Check) -> list[Tensor]:
    """Return this rank's rows of out and of the gradients, on the CPU."""
    shards = Shards.build(of.rows, layout=row.layout, degree=row.degree, work=of.mechanism.keys_per_query)
    job = Job(mechanism=of.mechanism, shards=shards, shape=_shape(here, of.shape))
    planned, rank = _plan(here, row, job), here.ranks.rank
    whole = replace(of, shape=job.shape).inputs()
    dout = shards.shard(gradient_of_out(len(of.rows), job.shape), rank)
    with planned.scope():
        found = outcome(planned.attention, [shards.shard(x.detach(), rank).requires_grad_() for x in whole], dout)
    return [x.cpu() for x in found]


def time_pass(
    here: Here, row: Row, tokens: int, shape: Shape, *, late_s: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward pass, each begun when all ranks were ready.

    late_s: delay of every transfer, forward and backward.
    """
    prepared = _prepared(here, row, tokens, shape)
    with prepared.planned.scope():
        return _time(here, prepared, late_s)


def measure(here: Here, row: Row, tokens: int, shape: Shape) -> Needs:
    """Return what a pass needs; to be called first of all in a fresh process, as what is freed hides what is needed."""
    warm_up = _prepare(here, row, min(WARM_UP_TOKENS * row.degree, tokens), shape)
    with warm_up.planned.scope(), warm_up.planned.counting():
        outcome(warm_up.planned.attention, warm_up.inputs, warm_up.dout)  # loads libraries and their workspaces
    prepared = _prepare(here, row, tokens, shape)
    planned, traffic, peak = prepared.planned, prepared.planned.traffic, None
    here.align()
    if traffic is not None:
        traffic.take()
    with planned.scope(), planned.counting():
        if tells_memory(here.device):
            peak = peaks_of_pass(planned.attention, prepared.inputs, prepared.dout)["fwd_bwd"]
        else:
            outcome(planned.attention, prepared.inputs, prepared.dout)
    sent = None if traffic is None else traffic.take().sent.total()
    stated = None
    if planned.volume is not None:
        volume = planned.volume(prepared.job)
        stated = volume.forward + volume.backward
    shards, queries = prepared.job.shards, planned.queries
    of_token = prepared.job.mechanism.keys_per_query(shards.rows)
    work = float(of_token[queries.tokens[queries.tokens >= 0]].sum()) * queries.heads
    return Needs(peak=peak, sent=sent, stated=stated, work=work)


def forget(here: Here) -> None:
    """Drop all plans and inputs."""
    here.kept.clear()


def _time(here: Here, prepared: _Prepared, late_s: tuple[float, float]) -> tuple[float, float]:
    here.align()
    here.delay.seconds, begun = late_s[0], time.perf_counter()
    out = prepared.planned.attention(*prepared.inputs)
    here.synchronize()
    forward = time.perf_counter() - begun
    here.align()
    here.delay.seconds, begun = late_s[1], time.perf_counter()
    torch.autograd.grad(out, prepared.inputs, prepared.dout)
    here.synchronize()
    backward = time.perf_counter() - begun
    here.delay.seconds = 0.0
    return forward, backward


def _prepared(here: Here, row: Row, tokens: int, shape: Shape) -> _Prepared:
    """Return the plan and the inputs of a row, made at the first call."""
    key = f"{row.name}, {tokens} tokens"
    if key not in here.kept:
        here.kept[key] = prepared = _prepare(here, row, tokens, shape)
        with prepared.planned.scope():
            for _ in range(WARM_UPS[here.device.type]):
                _time(here, prepared, (0.0, 0.0))
    return here.kept[key]


def _prepare(here: Here, row: Row, tokens: int, shape: Shape) -> _Prepared:
    job, rank = row.job(tokens, _shape(here, shape)), here.ranks.rank
    return _Prepared(job, _plan(here, row, job), job.inputs(rank), job.gradient_of_out(rank))


def _plan(here: Here, row: Row, job: Job) -> Planned:
    width = row.entrant.width(job.mechanism, job.shape.heads, row.degree)
    return row.entrant.plan(job, here.channel(width))


def _shape(here: Here, shape: Shape) -> Shape:
    """Return a shape on this rank's own device."""
    return replace(shape, device=here.device)

"""Every mechanism under every strategy, degree and layout, against one process in float64.

out, lse, dq, dk, dv of the ranks, put together, equal the reference backend's on the whole sequence; and the bytes
that were counted on the way equal the strategy's own formula.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.mechanism import MECHANISMS, Gathered, Heads, Mechanism, Recurrent
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.rows import Rows
from farspan.kernels.whole import plan_whole
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.gathered import deal_chosen, gathered_shape
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.strategy import STRATEGIES, AttentionShape
from tests.oracle import relative_error, rms_error
from tests.ranks import RankPool

# Sums of a few hundred float64 terms in another order: errors stay some ten times 1e-16 times the values.
FLOAT64_TOLERANCE = 1e-10
DEGREES = [1, 2, 4, 8]
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=2), Heads(query=8, kv=1)]
HEAD_DIM, VALUE_DIM = 16, 8
DOCUMENTS = {
    "one": Rows.packed([321]),
    "ragged": Rows.packed([1, 130, 3, 77, 40, 2, 90]),
    # Under the contiguous layout of 8 ranks the last three hold nothing but padding.
    "padded_ranks": Rows.packed([150, 37, 3], padding=130),
}


@dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    strategy: str
    layout: str
    documents: str
    heads: Heads
    dtype: torch.dtype = torch.float64

    @property
    def rows(self) -> Rows:
        return DOCUMENTS[self.documents]

    def inputs(self) -> tuple[Tensor, ...]:
        """The whole sequence's q, k, v, routing and the gradient of out; the same on every rank."""
        generator = torch.Generator().manual_seed(1)
        tokens, width = len(self.rows), self.mechanism.routing_width
        shapes = [
            (tokens, self.heads.query, HEAD_DIM),
            (tokens, self.heads.kv, HEAD_DIM),
            (tokens, self.heads.kv, VALUE_DIM),
            (tokens, self.heads.query, VALUE_DIM),
        ]
        q, k, v, dout = (torch.randn(*s, generator=generator, dtype=torch.float64).to(self.dtype) for s in shapes)
        routing = torch.randn(tokens, self.heads.kv, width, generator=generator, dtype=torch.float64)
        return q, k, v, *([routing.to(accumulation_dtype(self.dtype))] if width else []), dout


Sent = dict[str, dict[str, int]]
"""Bytes by kind of transfer, of the forward and of the backward pass."""


def run_cases(chosen: list[Case]) -> list[tuple[list[Tensor], Sent]]:
    """On each rank: return its out, lse, dq, dk, dv and the bytes that it sent, for every case."""
    return [run_case(case) for case in chosen]


def run_case(case: Case) -> tuple[list[Tensor], Sent]:
    channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
    shards = Shards.deal(case.rows, layout=case.layout, degree=channel.size)
    planned = STRATEGIES.get(case.strategy)(channel).prepare(case.mechanism, shards, case.heads, backend="cpu")
    *inputs, dout = (shards.shard(x, channel.rank) for x in case.inputs())
    with torch.no_grad():
        out, saved = planned.forward(*inputs)
        forward_bytes = channel.traffic.take()
        gradients = [x.to(of.dtype) for x, of in zip(planned.backward(dout, saved), inputs, strict=True)]
        backward_bytes = channel.traffic.take()
        lse = planned.lse(saved)
    return [out, *([] if lse is None else [lse]), *gradients], {"forward": forward_bytes, "backward": backward_bytes}


@functools.cache
def reference(mechanism: Mechanism, documents: str, heads: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One process, the reference backend, float64, of inputs rounded to `dtype`."""
    case = Case(mechanism, "single", "contiguous", documents, heads, dtype)
    *inputs, dout = (x.double() for x in case.inputs())
    whole = plan_whole(mechanism, case.rows, heads, range(heads.query), backend="reference")
    out, saved = whole.forward(*inputs)
    lse = whole.lse(saved)
    return [out, *([] if lse is None else [lse]), *whole.backward(dout, saved)]


def cases(strategy: str, degree: int, mechanism_name: str) -> list[Case]:
    """Every pair of layout, documents and heads with every example, if the strategy admits it at this degree.

    A third of all triples covers the pairs; which third changes with the degree, so that all triples have their turn.
    """
    return [
        Case(mechanism, strategy, layout, documents, heads)
        for mechanism in MECHANISMS.get(mechanism_name).examples()
        for a, layout in enumerate(LAYOUTS)
        for b, documents in enumerate(DOCUMENTS)
        for c, heads in enumerate(HEADS)
        if (a + b + c) % 3 == DEGREES.index(degree) % 3
        if STRATEGIES.get(strategy).refusal(mechanism, heads, degree) is None
    ]


def label(case: Case) -> str:
    heads = f"{case.heads.query}:{case.heads.kv}"
    return f"{case.mechanism}-{case.strategy}-{case.layout}-{case.documents}-{heads}"


def put_together(case: Case, degree: int, parts: list[list[Tensor]]) -> list[Tensor]:
    """Return the whole sequence's tensors from every rank's list of them."""
    shards = Shards.deal(case.rows, layout=case.layout, degree=degree)
    return [shards.unshard(torch.stack(part)) for part in zip(*parts, strict=True)]


def volume(case: Case, degree: int) -> dict[str, int]:
    shards, mechanism, heads = Shards.deal(case.rows, layout=case.layout, degree=degree), case.mechanism, case.heads
    strategy = STRATEGIES.get(case.strategy)
    shape = AttentionShape(
        tokens_local=shards.tokens_local,
        heads=heads,
        head_dim=HEAD_DIM,
        value_dim=VALUE_DIM,
        element_bytes=case.dtype.itemsize,
        accumulation_bytes=accumulation_dtype(case.dtype).itemsize,
        routing_width=mechanism.routing_width,
        total_bytes=mechanism.total_bytes(case.rows, heads, HEAD_DIM),
    )
    if isinstance(mechanism, Gathered) and not strategy.deals_heads:
        logits = case.inputs()[3][..., 0].float()
        shape = gathered_shape(shape, deal_chosen(mechanism, logits, shards, 0)[0].tokens_local)
    stated = strategy.volume(shape, degree)
    return {"forward": stated.forward, "backward": stated.backward}


def differing_bytes(case: Case, degree: int, sent: list[Sent]) -> list[str]:
    """Return a line for each pass of each rank in which the bytes are not those of the formula."""
    stated = volume(case, degree)
    return [
        f"{label(case)}: rank {rank} sent {sum(kinds.values())} bytes {direction}, {kinds}, not {stated[direction]}"
        for rank, of_rank in enumerate(sent)
        for direction, kinds in of_rank.items()
        if sum(kinds.values()) != stated[direction]
    ]


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
    chosen = cases(strategy, degree, mechanism)
    if not chosen:
        is_recurrent = isinstance(MECHANISMS.get(mechanism).examples()[0], Recurrent)
        assert (strategy == "single" and degree > 1) or (strategy == "ring" and is_recurrent)
        return
    assert len(chosen) >= 2 * len(LAYOUTS)
    results = ranks(degree).run(run_cases, chosen)
    wrong = []
    for number, case in enumerate(chosen):
        whole = put_together(case, degree, [of_rank[number][0] for of_rank in results])
        expected = reference(case.mechanism, case.documents, case.heads)
        error = max(relative_error(a, b) for a, b in zip(whole, expected, strict=True))
        if error > FLOAT64_TOLERANCE:
            wrong.append(f"{label(case)}: {error:.1e}")
        wrong += differing_bytes(case, degree, [of_rank[number][1] for of_rank in results])
    assert not wrong, f"{len(chosen)} cases differ from one process or their formula:\n" + "\n".join(wrong)


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_bfloat16_loses_no_more_than_one_process_does(
    ranks: Callable[[int], RankPool], strategy: str, mechanism: str
) -> None:
    """Partial results are merged in float32: the error of eight ranks is that of one process in bfloat16.

    1.5: Ulysses rounds the gradients of a KV head's replicas before it sums them, and the sum again: of two equal
    roundings the root of 2, give or take. An lse is float32 throughout; its errors are too small to compare.
    """
    example = MECHANISMS.get(mechanism).examples()[0]
    case = Case(example, strategy, "zigzag", "ragged", HEADS[1], torch.bfloat16)
    if STRATEGIES.get(strategy).refusal(example, case.heads, 8) is not None:
        return
    alone = replace(case, strategy="single")
    expected = reference(example, case.documents, case.heads, torch.bfloat16)

    def error(of: Case, degree: int, expected: list[Tensor] = expected) -> list[float]:
        whole = put_together(of, degree, [parts[0][0] for parts in ranks(degree).run(run_cases, [of])])
        return [rms_error(a, b) for a, b in zip(whole, expected, strict=True)]

    for got, allowed in zip(error(case, 8), error(alone, 1), strict=True):
        assert got <= max(1.5 * allowed, 1e-5), f"{label(case)}: {got:.1e}, one process {allowed:.1e}"

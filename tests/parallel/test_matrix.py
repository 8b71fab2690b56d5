"""Every mechanism under every strategy, degree and layout, against one process in float64.

out, lse, dq, dk, dv of the ranks, put together, equal the reference backend's on the whole sequence; and the bytes
that were counted on the way equal the strategy's own formula.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Access, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Heads, Sizes
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.comm import Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.oracle import relative_error, rms_error
from tests.support.rank_pool import RankPool, world_channel

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
    width: int = 1
    dtype: torch.dtype = torch.float64
    rounded: bool = False

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


@dataclass(frozen=True)
class Sent:
    """What a rank sent in one pass, as counted and as its strategy's formula says."""

    counted: Traffic
    stated: int


def run_cases(chosen: list[Case]) -> list[tuple[list[Tensor], list[Sent]]]:
    """On each rank: return its out, lse, dq, dk, dv and what it sent forward and backward, for every case."""
    return [run_case(case) for case in chosen]


def run_case(case: Case) -> tuple[list[Tensor], list[Sent]]:
    channel = world_channel(case.width)
    shards = Shards.deal(case.rows, layout=case.layout, degree=channel.size, work=case.mechanism.keys_per_query)
    strategy = STRATEGIES.get(case.strategy)(channel, rounded_gradients=case.rounded)
    planned = strategy.prepare(case.mechanism, shards, case.heads, backend="cpu")
    *whole, dout = case.inputs()
    *inputs, dout = (shards.shard(x, channel.rank) for x in (*whole, dout))
    with torch.no_grad():
        out, saved = planned.forward(*inputs)
        forward_traffic = channel.traffic.take()
        gradients = [x.to(of.dtype) for x, of in zip(planned.backward(dout, saved), inputs, strict=True)]
        backward_traffic = channel.traffic.take()
        lse = planned.lse(saved)
        q, k, _, *routing = whole
        source = functools.partial(case.mechanism.route, case.rows, case.heads, q, k, *routing)
        stated = planned.volume(Sizes.of(case.dtype, HEAD_DIM, VALUE_DIM), source)
    sent = [Sent(forward_traffic, stated.forward), Sent(backward_traffic, stated.backward)]
    return [out, *([] if lse is None else [lse]), *gradients], sent


@functools.cache
def reference(mechanism: Mechanism, documents: str, heads: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One process, the reference backend, float64, of inputs rounded to `dtype`."""
    case = Case(mechanism, "single", "contiguous", documents, heads, dtype=dtype)
    *inputs, dout = (x.double() for x in case.inputs())
    whole = plan_sequence_attention(mechanism, case.rows, heads, range(heads.query), backend="reference")
    out, saved = whole.forward(*inputs)
    lse = whole.lse(saved)
    return [out, *([] if lse is None else [lse]), *whole.backward(dout, saved)]


def cases(strategy: str, degree: int, mechanism_name: str) -> list[Case]:
    """Every example under every layout, with every kind of documents and heads, if the strategy admits it.

    At each degree one of nine triples; which changes with degree, example and strategy, so that all have their turn.
    """
    turn = DEGREES.index(degree)
    return [
        Case(mechanism, strategy, layout, documents, heads, width)
        for number, mechanism in enumerate(MECHANISMS.get(mechanism_name).examples())
        for a, layout in enumerate(LAYOUTS)
        for b, documents in enumerate(DOCUMENTS)
        for c, heads in enumerate(HEADS)
        if (a + b + c - turn) % 3 == 0 and (a - b + number + list(STRATEGIES).index(strategy)) % 3 == 0
        for width in [width_for(strategy, degree, turn=a)]
        if STRATEGIES.get(strategy).unsupported_reason(mechanism, heads, degree, width) is None
    ]


def width_for(strategy: str, degree: int, turn: int) -> int:
    """Return the inner axis of a strategy that needs a grid: of eight ranks two or four, in turn."""
    if degree < 4 or STRATEGIES.get(strategy).unsupported_reason(Dense(), HEADS[0], degree, 2) == STRATEGIES.get(
        strategy
    ).unsupported_reason(Dense(), HEADS[0], degree, 1):
        return 1
    return 4 if degree == 8 and turn % 2 else 2


def label(case: Case) -> str:
    heads = f"{case.heads.query}:{case.heads.kv}"
    return f"{case.mechanism}-{case.strategy}-{case.layout}-{case.documents}-{heads}"


def put_together(case: Case, degree: int, parts: list[list[Tensor]]) -> list[Tensor]:
    """Return the whole sequence's tensors from every rank's list of them."""
    shards = Shards.deal(case.rows, layout=case.layout, degree=degree, work=case.mechanism.keys_per_query)
    return [shards.unshard(torch.stack(part)) for part in zip(*parts, strict=True)]


def differing_bytes(case: Case, sent: list[list[Sent]]) -> list[str]:
    """Return a line for each pass of each rank in which the bytes are not those of the formula.

    And one if what all ranks received is not what all sent.
    """
    wrong = []
    for number, direction in enumerate(("forward", "backward")):
        passes = [of_rank[number] for of_rank in sent]
        wrong += [
            f"{label(case)}: rank {rank} sent {dict(one.counted.sent)} {direction}, not {one.stated}"
            for rank, one in enumerate(passes)
            if one.counted.sent.total() != one.stated
        ]
        if sum(one.counted.received.total() for one in passes) != sum(one.stated for one in passes):
            wrong.append(f"{label(case)}: not all that was sent {direction} was received")
    return wrong


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
    chosen = cases(strategy, degree, mechanism)
    if not chosen:
        assert is_refused_whatever_the_heads(strategy, degree, mechanism)
        return
    results = ranks(degree).run(run_cases, chosen)
    wrong = []
    for number, case in enumerate(chosen):
        whole = put_together(case, degree, [of_rank[number][0] for of_rank in results])
        expected = reference(case.mechanism, case.documents, case.heads)
        error = max(relative_error(a, b) for a, b in zip(whole, expected, strict=True))
        if not error <= FLOAT64_TOLERANCE:
            wrong.append(f"{label(case)}: {error:.1e}")
        wrong += differing_bytes(case, [of_rank[number][1] for of_rank in results])
    assert not wrong, f"{len(chosen)} cases differ from one process or their formula:\n" + "\n".join(wrong)


def is_refused_whatever_the_heads(strategy: str, degree: int, mechanism: str) -> bool:
    """Whether a pair may have no case: the strategy does not serve its accesses, or the degree does not suit it."""
    example = MECHANISMS.get(mechanism).examples()[0]
    width = width_for(strategy, degree, turn=0)
    return all(
        STRATEGIES.get(strategy).unsupported_reason(example, heads, degree, width) is not None for heads in HEADS
    )


MOVE_KEYS = {Access.MASK, Access.BLOCKS, Access.LIFETIMES}
SERVED: dict[str, set[Access]] = {
    **dict.fromkeys(("ring", "double_ring", "gather", "fetch"), MOVE_KEYS),
    "ship": {Access.BLOCKS},
    "state": {Access.STATE},
}
"""The accesses that strategies serve; the others serve all. A strategy that refuses some has to be put here."""


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_accesses_decide_what_a_strategy_takes(strategy: str) -> None:
    """At a degree that suits it."""
    for name in MECHANISMS:
        refused = all(is_refused_whatever_the_heads(strategy, degree, name) for degree in DEGREES)
        served = MECHANISMS.get(name).examples()[0].accesses <= SERVED.get(strategy, set(Access))
        assert refused != served, name


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
    width = width_for(strategy, 8, turn=0)
    case = Case(example, strategy, "zigzag", "ragged", HEADS[1], width, torch.bfloat16)
    if STRATEGIES.get(strategy).unsupported_reason(example, case.heads, 8, width) is not None:
        return
    alone = replace(case, strategy="single", width=1)
    expected = reference(example, case.documents, case.heads, torch.bfloat16)

    def error(of: Case, degree: int, expected: list[Tensor] = expected) -> list[float]:
        whole = put_together(of, degree, [parts[0][0] for parts in ranks(degree).run(run_cases, [of])])
        return [rms_error(a, b) for a, b in zip(whole, expected, strict=True)]

    for got, allowed in zip(error(case, 8), error(alone, 1), strict=True):
        assert got <= max(1.5 * allowed, 1e-5), f"{label(case)}: {got:.1e}, one process {allowed:.1e}"

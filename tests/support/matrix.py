"""Every mechanism under every strategy and degree, against one process in float64.

out, lse, dq, dk, dv of the ranks, put together, equal the reference backend's on the full sequence; and the counted
bytes equal the strategy's own formula. The tests are in tests/parallel/matrix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.planner import Heads, Sizes
from farspan.parallel.comm import GradCommDtype, Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.mechanisms import attend, inputs_of
from tests.support.oracle import relative_error
from tests.support.rank_pool import RankPool, world_channel

# Sums of a few hundred float64 terms in another order: errors stay some ten times 1e-16 times the values.
FLOAT64_TOLERANCE = 1e-10
TURNS = {1: (0,), 2: (1,), 4: (0, 2), 8: (3,)}
"""Which layouts an example has at each degree, from a first one on that changes with example, mechanism and strategy:
over all degrees it has every layout."""
DEGREES = list(TURNS)
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=2), Heads(query=8, kv=1)]
HEAD_DIM, VALUE_DIM = 16, 8
DOCUMENTS = {
    "one": Rows.packed([321]),
    "ragged": Rows.packed([1, 130, 3, 77, 40, 2, 90]),
    # Under the contiguous layout of 8 ranks the last three hold nothing but padding.
    "padded_ranks": Rows.packed([150, 37, 3], padding=130),
}
TINY = {
    "nothing": Rows.packed([]),
    "no_documents": Rows.packed([0, 0]),
    "a_token": Rows.packed([1]),
    "empty_and_tiny": Rows.packed([0, 1, 0, 1, 0, 3]),
}
"""Ranks without tokens, and documents of 0 and 1; the matrix has larger ones."""


@dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    strategy: str
    layout: str
    documents: str
    heads: Heads
    inner_size: int = 1
    dtype: torch.dtype = torch.float64
    grad_comm_dtype: GradCommDtype = "accumulation"

    @property
    def rows(self) -> Rows:
        return {**DOCUMENTS, **TINY}[self.documents]

    def inputs(self) -> list[Tensor]:
        """q, k, v, routing and the gradient of out of the full sequence; the same on every rank."""
        return inputs_of(self.mechanism, len(self.rows), self.heads, (HEAD_DIM, VALUE_DIM), self.dtype, seed=1)

    def shards(self, degree: int) -> Shards:
        return Shards.build(self.rows, layout=self.layout, degree=degree, work=self.mechanism.keys_per_query)


@dataclass(frozen=True)
class Sent:
    """What a rank sent in one pass, as counted and as its strategy's formula says."""

    counted: Traffic
    stated: int


def run_cases(cases: list[Case]) -> list[tuple[list[Tensor], list[Sent]]]:
    """On each rank: return its out, lse, dq, dk, dv and what it sent forward and backward, for every case."""
    return [run_case(case) for case in cases]


def run_case(case: Case) -> tuple[list[Tensor], list[Sent]]:
    channel = world_channel(case.inner_size)
    shards = case.shards(channel.size)
    strategy = STRATEGIES.get(case.strategy)(channel, grad_comm_dtype=case.grad_comm_dtype)
    planned = strategy.prepare(case.mechanism, shards, case.heads, backend="cpu")
    q, k, _, *routing, _ = global_inputs = case.inputs()
    *inputs, dout = (shards.shard(x, channel.rank) for x in global_inputs)
    with torch.no_grad():
        out, saved = planned.forward(*inputs)
        forward_traffic = channel.traffic.take()
        gradients = [x.to(of.dtype) for x, of in zip(planned.backward(dout, saved), inputs, strict=True)]
        backward_traffic = channel.traffic.take()
        lse = planned.lse(saved)
        source = functools.partial(case.mechanism.route, case.rows, case.heads, q, k, *routing)
    stated = planned.volume(Sizes.of(case.dtype, HEAD_DIM, VALUE_DIM), source)
    sent = [Sent(forward_traffic, stated.forward), Sent(backward_traffic, stated.backward)]
    return [out, *([] if lse is None else [lse]), *gradients], sent


@functools.cache
def reference(mechanism: Mechanism, documents: str, heads: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One process, the reference backend, float64, of inputs rounded to `dtype`."""
    case = Case(mechanism, "single", "contiguous", documents, heads, dtype=dtype)
    return attend(mechanism, case.rows, heads, [x.double() for x in case.inputs()])


def cases_of(strategy: str, degree: int, mechanism_name: str) -> list[Case]:
    """Every example, if the strategy admits it; documents and heads follow from the layout, so that all are tried."""
    place, names, found = list(STRATEGIES).index(strategy), list(MECHANISMS), []
    for number, mechanism in enumerate(MECHANISMS.get(mechanism_name).examples()):
        first = place + number + names.index(mechanism_name)
        for a in [(first + turn) % len(LAYOUTS) for turn in TURNS[degree]]:
            b = (a + number + place) % len(DOCUMENTS)
            heads = HEADS[(DEGREES.index(degree) - a - b) % len(HEADS)]
            inner_size = inner_size_for(strategy, degree, turn=a)
            if STRATEGIES.get(strategy).unsupported_reason(mechanism, heads, degree, inner_size) is None:
                found.append(Case(mechanism, strategy, list(LAYOUTS)[a], list(DOCUMENTS)[b], heads, inner_size))
    return found


def inner_size_for(strategy: str, degree: int, turn: int) -> int:
    """Return the inner axis of a strategy that needs a grid: of eight ranks two or four, in turn."""
    reason = STRATEGIES.get(strategy).unsupported_reason
    if degree < 4 or reason(Dense(), HEADS[0], degree, 2) == reason(Dense(), HEADS[0], degree, 1):
        return 1
    return 4 if degree == 8 and turn % 2 else 2


def label(case: Case) -> str:
    heads = f"{case.heads.query}:{case.heads.kv}"
    return f"{case.mechanism}-{case.strategy}-{case.layout}-{case.documents}-{heads}"


def unshard(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    """Return the full sequence's tensors from every rank's list of them."""
    shards = case.shards(len(parts))
    return [shards.unshard(torch.stack(part)) for part in zip(*parts, strict=True)]


def differing_bytes(case: Case, sent: list[list[Sent]]) -> list[str]:
    """Return a line for each pass of each rank whose bytes are not those of the formula, or were not received."""
    wrong = []
    for number, direction in enumerate(("forward", "backward")):
        passes = [of_rank[number] for of_rank in sent]
        wrong += [
            f"{label(case)}: rank {rank} sent {dict(one.counted.sent)} {direction}, not {one.stated}"
            for rank, one in enumerate(passes)
            if one.counted.sent.total() != one.stated
        ]
        if sum(one.counted.received.total() for one in passes) != sum(one.stated for one in passes):
            wrong.append(f"{label(case)}: ranks received less {direction} than was sent")
    return wrong


def matrix_test(strategies: list[str], degrees: list[int]) -> Callable[..., None]:
    """Return the test of these strategies and degrees with every mechanism."""

    @pytest.mark.parametrize("mechanism", list(MECHANISMS))
    @pytest.mark.parametrize("degree", degrees)
    @pytest.mark.parametrize("strategy", strategies)
    def equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
        """Pairs without a case must be refused whatever the heads."""
        cases = cases_of(strategy, degree, mechanism)
        if not cases:
            assert is_refused_whatever_the_heads(strategy, degree, mechanism)
            return
        results, wrong = ranks(degree).run(run_cases, cases), []
        for number, case in enumerate(cases):
            found = unshard(case, [of_rank[number][0] for of_rank in results])
            expected = reference(case.mechanism, case.documents, case.heads)
            error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
            if not error <= FLOAT64_TOLERANCE:
                wrong.append(f"{label(case)}: {error:.1e}")
            wrong += differing_bytes(case, [of_rank[number][1] for of_rank in results])
        assert not wrong, f"of {len(cases)} cases these differ from one process or their formula:\n" + "\n".join(wrong)

    return equals_one_process


def is_refused_whatever_the_heads(strategy: str, degree: int, mechanism: str) -> bool:
    """Whether a pair may have no case: the strategy does not serve its accesses, or the degree does not suit it."""
    example = MECHANISMS.get(mechanism).examples()[0]
    inner_size = inner_size_for(strategy, degree, turn=0)
    return all(
        STRATEGIES.get(strategy).unsupported_reason(example, heads, degree, inner_size) is not None for heads in HEADS
    )

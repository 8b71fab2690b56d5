"""Every mechanism under every strategy, degree and layout, against one process in float64.

out, lse, dq, dk, dv of the ranks, put together, equal the reference backend's on the whole sequence; and the bytes
that were counted on the way equal the strategy's own formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.attend import attend, attend_backward
from farspan.kernels.mechanism import MECHANISMS, Masked, Mechanism
from farspan.kernels.plan import Plan
from farspan.kernels.rows import Rows
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.strategy import STRATEGIES, AttentionShape, Heads
from tests.ranks import RankPool

# Sums of a few hundred float64 terms in another order: errors stay some ten times 1e-16 times the values.
FLOAT64_TOLERANCE = 1e-10
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

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The whole sequence's q, k, v and the gradient of out; the same on every rank."""
        generator = torch.Generator().manual_seed(1)
        tokens = len(self.rows)
        shapes = [
            (tokens, self.heads.query, HEAD_DIM),
            (tokens, self.heads.kv, HEAD_DIM),
            (tokens, self.heads.kv, VALUE_DIM),
            (tokens, self.heads.query, VALUE_DIM),
        ]
        q, k, v, dout = (torch.randn(*s, generator=generator, dtype=torch.float64).to(self.dtype) for s in shapes)
        return q, k, v, dout


def run_case(case: Case, degree: int) -> tuple[list[Tensor], dict[str, int]]:
    """On each rank: return this rank's out, lse, dq, dk, dv and the bytes it sent."""
    channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
    shards = Shards.deal(case.rows, layout=case.layout, degree=degree)
    planned = STRATEGIES.get(case.strategy)(channel).prepare(case.mechanism, shards, case.heads, backend="cpu")
    q, k, v, dout = (shards.shard(x, channel.rank) for x in case.inputs())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = planned(*leaves)
    forward_bytes = channel.traffic.take()
    gradients = torch.autograd.grad(out, leaves, dout)
    backward_bytes = channel.traffic.take()
    with torch.no_grad():
        lse = planned.lse(planned.forward(q, k, v)[1])
    counted = {"forward": sum(forward_bytes.values()), "backward": sum(backward_bytes.values())}
    return [out.detach(), lse, *gradients], counted


def reference(case: Case) -> list[Tensor]:
    """One process, the reference backend, float64."""
    assert isinstance(case.mechanism, Masked)
    plan = Plan.build(case.rows, case.rows, case.mechanism.visibility())
    q, k, v, dout = (x.double() for x in case.inputs())
    out, lse = attend(q, k, v, plan, backend="reference")
    return [out, lse, *attend_backward(dout, q, k, v, out, lse, plan, backend="reference")]


def cases(degree: int) -> list[Case]:
    """Every pair that the registries admit at this degree."""
    return [
        Case(mechanism, strategy, layout, documents, heads)
        for name in MECHANISMS
        for mechanism in MECHANISMS.get(name).examples()
        for strategy in STRATEGIES
        for layout in LAYOUTS
        for documents in DOCUMENTS
        for heads in HEADS
        if STRATEGIES.get(strategy).refusal(mechanism, heads, degree) is None
    ]


def label(case: Case) -> str:
    heads = f"{case.heads.query}:{case.heads.kv}"
    return f"{case.mechanism}-{case.strategy}-{case.layout}-{case.documents}-{heads}"


def largest_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute difference; -inf must stand in the same places and nothing may be NaN."""
    error = 0.0
    for a, b in zip(got, expected, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a.isneginf(), b.isneginf())
        error = max(error, (a - b).masked_fill(b.isneginf(), 0.0).abs().max().item())
    return error


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int) -> None:
    chosen = [case for case in cases(degree) if case.strategy == strategy]
    if strategy == "single" and degree > 1:
        assert not chosen
        return
    assert len(chosen) >= len(LAYOUTS) * len(DOCUMENTS) * len(HEADS)
    wrong: list[str] = []
    for case in chosen:
        results: list[Any] = ranks(degree).run(run_case, case, degree)
        shards = Shards.deal(case.rows, layout=case.layout, degree=degree)
        whole = [shards.unshard(torch.stack(parts)) for parts in zip(*(tensors for tensors, _ in results), strict=True)]
        error = largest_error(whole, reference(case))
        if error > FLOAT64_TOLERANCE:
            wrong.append(f"{label(case)}: {error:.1e}")
        shape = AttentionShape(
            tokens_local=shards.tokens_local,
            heads=case.heads,
            head_dim=HEAD_DIM,
            value_dim=VALUE_DIM,
            element_bytes=8,
            accumulation_bytes=8,
        )
        volume = STRATEGIES.get(strategy).volume(shape, degree)
        for _, counted in results:
            assert counted == {"forward": volume.forward, "backward": volume.backward}, label(case)
    assert not wrong, f"{len(wrong)} of {len(chosen)} cases differ from one process:\n" + "\n".join(wrong)

"""Single: one rank holds the whole sequence and nothing moves."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from farspan.kernels.attend import attend, attend_backward
from farspan.kernels.mechanism import Masked, Mechanism, choose
from farspan.kernels.plan import Plan
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Heads, Saved, Strategy, Volume


@final
class Single(Strategy):
    """Context parallelism of degree 1."""

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        if degree != 1:
            return f"strategy 'single' keeps the sequence on one rank: set parallel.context=1 instead of {degree}."
        return None

    @classmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        return Volume(forward=0, backward=0)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        assert isinstance(mechanism, Masked)
        rows = shards.rows_of(self.channel.rank)
        plan = Plan.build(rows, rows, mechanism.visibility(), heads=heads.query)
        return _SingleAttend(
            tokens_local=shards.tokens_local, heads=heads, mechanism=mechanism, plan=plan, backend=backend
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _SingleAttend(Attend):
    mechanism: Masked
    plan: Plan
    backend: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        plan = choose(self.mechanism, self.plan, q, k)
        out, lse = attend(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse), (plan,))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        return attend_backward(dout, *saved.tensors, plan=saved.plans[0], backend=self.backend)

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-1]


STRATEGIES.add("single", Single)

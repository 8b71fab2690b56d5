"""Attention over one whole sequence whose rows are all held here: every mechanism, whatever its kind.

A single rank does just this; so does each rank of a strategy that deals heads instead of tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from farspan.kernels.attention import attend, attend_backward
from farspan.kernels.lifetime_shard import AgeingHolding, TypeLearning
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Ageing, Gathered, Heads, Holding, Masked, Mechanism, Recurrent, Routed, alone
from farspan.kernels.planning.plan import Plan
from farspan.kernels.routing.token_choice import Gathering, weigh, weigh_backward
from farspan.kernels.sequence_scan import WholeScan


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward pass keeps for its backward pass; nothing in it grows with the square of the sequence.

    kept: what is not a tensor to save, such as plans with what was selected.
    """

    tensors: tuple[Tensor, ...]
    kept: tuple[Any, ...] = ()


class WholeAttention(ABC):
    """Attention of the rows of one sequence to each other, planned; `inputs` are q, k, v and, if it has one, routing.

    Shapes: q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]`, routing `[T, Hk, routing_width]`, out `[T, Hq, Dv]`.
    """

    @abstractmethod
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """Return out, in the dtype of q, and what `backward` and `lse` need."""

    @abstractmethod
    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        """Return the gradient of each input, in its dtype or wider."""

    @abstractmethod
    def lse(self, saved: Saved) -> Tensor | None:
        """Return the log-sum-exp `[T, Hq]`, None where there is no softmax."""


def plan_whole(mechanism: Mechanism, rows: Rows, heads: Heads, which: range, *, backend: str) -> WholeAttention:
    """Plan attention of the query heads `which`, of `heads` in all, over a sequence of `rows`.

    Raises ValueError when the mechanism's options are for another number of heads.
    """
    if isinstance(mechanism, Recurrent):
        decay = mechanism.decay(heads.query)[which.start : which.stop]
        return _RecurrentAttention(WholeScan.build(rows, decay, backend=backend))
    if isinstance(mechanism, Gathered):
        return _GatheredAttention(mechanism, rows, backend)
    assert isinstance(mechanism, Masked)
    visibility = mechanism.visibility()
    # A part of the windows fits a part of the heads; all of them must fit all heads.
    visibility.by_heads(heads.query)
    plan = Plan.build(rows, rows, visibility.of_heads(slice(which.start, which.stop)), heads=len(which))
    if isinstance(mechanism, Ageing):
        share, index = AgeingHolding.share_of(heads, which), torch.arange(len(rows))
        ageing = AgeingHolding(mechanism=mechanism, everyone=rows, rows=index, share=share, total=alone)
        return _AgeingAttention(plan, ageing, backend)
    holding = None
    if isinstance(mechanism, Routed):
        holding = Holding(mechanism=mechanism, rows=rows, everyone=rows, heads=which, all_heads=heads, total=alone)
    return _MaskedAttention(plan, holding, backend)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _MaskedAttention(WholeAttention):
    plan: Plan
    holding: Holding | None
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        plan = self.plan
        if self.holding is not None:
            plan = plan.choosing(self.holding.mechanism.select(q, k, self.holding))
        out, lse = attend(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse), (plan,))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return attend_backward(dout, *saved.tensors, plan=saved.kept[0], backend=self.backend)

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-1]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _GatheredAttention(WholeAttention):
    mechanism: Gathered
    rows: Rows
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, _, routing = inputs
        gathering = Gathering.of(self.mechanism.choose(routing[..., 0].float(), self.rows), self.rows)
        heads = Heads(query=q.shape[1] // k.shape[1], kv=1)
        among = plan_whole(self.mechanism.among(), gathering.rows, heads, range(heads.query), backend=self.backend)
        return attend_gathered(among, gathering, *inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return attend_gathered_backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor:
        return gathered_lse(saved)


def attend_gathered(among: WholeAttention, gathering: Gathering, *inputs: Tensor) -> tuple[Tensor, Saved]:
    """Return out, 0 where nothing was gathered, of attention `among` the rows of `gathering`, weighed by routing."""
    q, k, v, routing = inputs
    part, saved = among.forward(*(gathering.collect(x, k.shape[1]) for x in (q, k, v)))
    logits = gathering.collect(routing, k.shape[1])
    out = gathering.spread(weigh(part, logits), q.shape[:2])
    return out, Saved((part, logits, *saved.tensors), (gathering, among, q.shape[:2], k.shape[:2], *saved.kept))


def attend_gathered_backward(dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and routing."""
    part, logits, *tensors = saved.tensors
    gathering, among, of_queries, of_keys, *kept = saved.kept
    dpart, dlogits = weigh_backward(gathering.collect(dout, of_keys[1]), part, logits)
    dq, *of_key_rows = among.backward(dpart, Saved(tuple(tensors), tuple(kept)))
    return gathering.spread(dq, of_queries), *(gathering.spread(x, of_keys) for x in (*of_key_rows, dlogits))


def gathered_lse(saved: Saved) -> Tensor:
    """Return the log-sum-exp `[T, Hq]`, -inf where nothing was gathered."""
    gathering, among, of_queries, _, *kept = saved.kept
    lse = among.lse(Saved(saved.tensors[2:], tuple(kept)))
    return gathering.spread(lse.unsqueeze(-1), of_queries, fill=float("-inf")).squeeze(-1)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _RecurrentAttention(WholeAttention):
    scan: WholeScan

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        out, tensors = self.scan.forward(q, k, v)
        return out, Saved(tensors)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return self.scan.backward(dout, saved.tensors)

    def lse(self, saved: Saved) -> None:
        return None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _AgeingAttention(WholeAttention):
    plan: Plan
    """Of all causal pairs."""
    holding: AgeingHolding
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        lifetimes = self.holding.lifetimes(routing)
        plan = self.plan.living(lifetimes.last)
        out, lse = attend(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse, routing), (plan, lifetimes))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        *operands, routing = saved.tensors
        q, k, v, out, _ = operands
        plan, lifetimes = saved.kept
        gradients = attend_backward(dout, *operands, plan=plan, backend=self.backend)
        causal_lse = attend(q, k, v, self.plan, backend=self.backend)[1]
        learning = TypeLearning(self.holding, lifetimes, causal_lse, routing)
        learning.add(dout, q, k, v, out, plan=self.plan, keys=self.holding.rows)
        return *gradients, learning.gradient()

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-2]

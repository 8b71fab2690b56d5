"""Attention over one whole sequence whose rows are all held here: every mechanism, whatever its kind.

A single rank does just this; so does each rank of a strategy that deals heads instead of tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.lifetime_shard import LifetimeShard, TypeLearning
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import (
    Heads,
    KVLifetime,
    LocalShard,
    Masked,
    Mechanism,
    Recurrent,
    Routed,
    TokenChoice,
    identity,
)
from farspan.kernels.planning.plan import Plan
from farspan.kernels.routing.token_choice import ChosenTokens, gate, gate_backward
from farspan.kernels.sequence_scan import SequenceScan


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward pass keeps for its backward pass; nothing in it grows with the square of the sequence.

    kept: what is not a tensor to save, such as plans with what was selected.
    """

    tensors: tuple[Tensor, ...]
    kept: tuple[Any, ...] = ()


class SequenceAttention(ABC):
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


def plan_sequence_attention(
    mechanism: Mechanism, rows: Rows, heads: Heads, which: range, *, backend: str
) -> SequenceAttention:
    """Plan attention of the query heads `which`, of `heads` in all, over a sequence of `rows`.

    Raises ValueError when the mechanism's options are for another number of heads.
    """
    if isinstance(mechanism, Recurrent):
        decay = mechanism.decay(heads.query)[which.start : which.stop]
        return _RecurrentAttention(SequenceScan.build(rows, decay, backend=backend))
    if isinstance(mechanism, TokenChoice):
        return _TokenChoiceAttention(mechanism, rows, backend)
    assert isinstance(mechanism, Masked)
    attention_mask = mechanism.attention_mask()
    # A part of the windows fits a part of the heads; all of them must fit all heads.
    attention_mask.by_heads(heads.query)
    plan = Plan.build(rows, rows, attention_mask.of_heads(slice(which.start, which.stop)), heads=len(which))
    if isinstance(mechanism, KVLifetime):
        share, index = LifetimeShard.share_of(heads, which), torch.arange(len(rows))
        lifetime_shard = LifetimeShard(mechanism=mechanism, global_rows=rows, rows=index, share=share, total=identity)
        return _LifetimeAttention(plan, lifetime_shard, backend)
    local_shard = None
    if isinstance(mechanism, Routed):
        local_shard = LocalShard(
            mechanism=mechanism, rows=rows, global_rows=rows, heads=which, all_heads=heads, total=identity
        )
    return _MaskedAttention(plan, local_shard, backend)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _MaskedAttention(SequenceAttention):
    plan: Plan
    local_shard: LocalShard | None
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        plan = self.plan
        if self.local_shard is not None:
            plan = plan.with_selection(self.local_shard.mechanism.select(q, k, self.local_shard))
        out, lse = attention_forward(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse), (plan,))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return attention_backward(dout, *saved.tensors, plan=saved.kept[0], backend=self.backend)

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-1]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _TokenChoiceAttention(SequenceAttention):
    mechanism: TokenChoice
    rows: Rows
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, _, routing = inputs
        chosen_tokens = ChosenTokens.of(self.mechanism.choose(routing[..., 0].float(), self.rows), self.rows)
        heads = Heads(query=q.shape[1] // k.shape[1], kv=1)
        among = plan_sequence_attention(
            self.mechanism.among(), chosen_tokens.rows, heads, range(heads.query), backend=self.backend
        )
        return token_choice_forward(among, chosen_tokens, *inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return token_choice_backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor:
        return token_choice_lse(saved)


def token_choice_forward(
    among: SequenceAttention, chosen_tokens: ChosenTokens, *inputs: Tensor
) -> tuple[Tensor, Saved]:
    """Return out of attention `among` the rows of `chosen_tokens`, gated by their routing; 0 at all other tokens."""
    q, k, v, routing = inputs
    part, saved = among.forward(*(chosen_tokens.collect(x, k.shape[1]) for x in (q, k, v)))
    logits = chosen_tokens.collect(routing, k.shape[1])
    out = chosen_tokens.spread(gate(part, logits), q.shape[:2])
    return out, Saved((part, logits, *saved.tensors), (chosen_tokens, among, q.shape[:2], k.shape[:2], *saved.kept))


def token_choice_backward(dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and routing."""
    part, logits, *tensors = saved.tensors
    chosen_tokens, among, of_queries, of_keys, *kept = saved.kept
    dpart, dlogits = gate_backward(chosen_tokens.collect(dout, of_keys[1]), part, logits)
    dq, *of_key_rows = among.backward(dpart, Saved(tuple(tensors), tuple(kept)))
    return chosen_tokens.spread(dq, of_queries), *(chosen_tokens.spread(x, of_keys) for x in (*of_key_rows, dlogits))


def token_choice_lse(saved: Saved) -> Tensor:
    """Return the log-sum-exp `[T, Hq]`, -inf where nothing was gathered."""
    chosen_tokens, among, of_queries, _, *kept = saved.kept
    lse = among.lse(Saved(saved.tensors[2:], tuple(kept)))
    return chosen_tokens.spread(lse.unsqueeze(-1), of_queries, fill=float("-inf")).squeeze(-1)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _RecurrentAttention(SequenceAttention):
    scan: SequenceScan

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
class _LifetimeAttention(SequenceAttention):
    plan: Plan
    """Of all causal pairs."""
    local_shard: LifetimeShard
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        lifetimes = self.local_shard.lifetimes(routing)
        plan = self.plan.with_lifetimes(lifetimes.last)
        out, lse = attention_forward(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse, routing), (plan, lifetimes))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        *operands, routing = saved.tensors
        q, k, v, out, _ = operands
        plan, lifetimes = saved.kept
        gradients = attention_backward(dout, *operands, plan=plan, backend=self.backend)
        causal_lse = attention_forward(q, k, v, self.plan, backend=self.backend)[1]
        learning = TypeLearning(self.local_shard, lifetimes, causal_lse, routing)
        learning.add(dout, q, k, v, out, plan=self.plan, keys=self.local_shard.rows)
        return *gradients, learning.gradient()

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-2]

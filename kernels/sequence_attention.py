"""Attention over a full sequence in one process: every mechanism, whatever its kind.

A single rank does just this; so does each rank of a strategy that shards heads instead of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, final

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.attention import attention_backward, attention_forward, prepare_attention
from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.linear_attention.state import Segment
from farspan.kernels.linear_attention.state import order as segment_order
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import (
    AttentionPlanner,
    Heads,
    HeadShare,
    InputSpec,
    KeyRouting,
    Saved,
    SequenceAttention,
)
from farspan.kernels.planning.plan import Plan
from farspan.kernels.recurrent_attention import (
    prepare_recurrence,
    recurrent_attention_backward,
    recurrent_attention_forward,
)


def plan_sequence_attention(
    mechanism: Mechanism, rows: Rows, heads: Heads, head_range: range, *, backend: str
) -> SequenceAttention:
    """Plan attention of the query heads `head_range`, of `heads` in all, over a sequence of `rows`.

    Raises ValueError when the mechanism's options are for another number of heads.
    """
    share = HeadShare(all_heads=heads, head_range=head_range)
    return mechanism.plan(SequencePlanner.of(rows, share, backend=backend))


def plan_last_queries(
    mechanism: Mechanism, rows: Rows, queries: Tensor, heads: Heads, *, backend: str
) -> SequenceAttention:
    """Plan attention of `queries`, the last tokens of documents, int64 `[T]`, to all keys, as those of a KV cache.

    Raises ConfigError for a mechanism that has to see all queries.
    """
    if mechanism.routing_width:
        raise ConfigError(
            f"{mechanism} cannot attend with the last tokens alone, as its router chooses among all: compute all "
            "tokens each time, without a KV cache."
        )
    share = HeadShare.all(heads)
    return mechanism.plan(LastQueriesPlanner(global_rows=rows, tokens=queries, share=share, backend=backend))


@dataclass(frozen=True, kw_only=True, eq=False)
class SequencePlanner(AttentionPlanner):
    """All rows are local, so that nothing is summed."""

    @staticmethod
    def of(rows: Rows, share: HeadShare, *, backend: str) -> "SequencePlanner":
        return SequencePlanner(global_rows=rows, tokens=torch.arange(len(rows)), share=share, backend=backend)

    @cached_property
    def local_rows(self) -> Rows:
        return self.global_rows

    def attend(self, attention_mask: AttentionMask, key_routing: KeyRouting) -> SequenceAttention:
        # A part of the windows fits a part of the heads; all of them must fit all heads.
        attention_mask.by_heads(self.share.all_heads.query)
        local_mask, heads = attention_mask.of_heads(self.share.slice), len(self.share.head_range)
        plan = Plan.build(self.local_rows, self.key_rows, local_mask, heads=heads)
        return _MaskedAttention(plan, torch.arange(len(self.key_rows)), key_routing, self.backend)

    def scan(self, decay: Tensor) -> SequenceAttention:
        return SequenceScan.build(self.local_rows, decay, backend=self.backend)

    def all_reduce_sum(self, x: Tensor, *, kind: str) -> Tensor:
        return x

    def all_rows(self, x: Tensor, *, kind: str) -> Tensor:
        return x

    def prepare_all_rows(self, device: torch.device) -> None:
        """All rows are at hand."""

    def of_tokens(self, rows: Rows, token: Tensor) -> Self:
        return replace(self, global_rows=rows, tokens=torch.arange(len(rows)))

    @property
    def tokens_by_owner(self) -> Tensor:
        return self.tokens[None]  # [T] -> [1, T]

    def all_to_all(self, x: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str) -> Tensor:
        return x


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LastQueriesPlanner(SequencePlanner):
    """Keys are those of all rows, queries those of the last `tokens` of documents."""

    @cached_property
    def local_rows(self) -> Rows:
        return self.global_rows.take(self.tokens)

    @property
    def key_rows(self) -> Rows:
        return self.global_rows

    def attend(self, attention_mask: AttentionMask, key_routing: KeyRouting) -> SequenceAttention:
        if not attention_mask.causal:
            raise ConfigError(
                f"{attention_mask} is not causal, so that the last tokens cannot attend alone, as earlier ones would "
                "see them: compute all tokens each time, without a KV cache."
            )
        return super().attend(attention_mask, key_routing)

    def scan(self, decay: Tensor) -> SequenceAttention:
        raise ConfigError(
            "a recurrence cannot go on with the last tokens alone, as keys and values are not its state: compute all "
            "tokens each time, without a KV cache."
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class _MaskedAttention(SequenceAttention):
    """plan: under the mask alone. tokens: of the sequence behind each key."""

    plan: Plan
    tokens: Tensor
    key_routing: KeyRouting
    backend: str

    def prepare(self, spec: InputSpec) -> None:
        prepare_attention(self.plan, self.tokens, self.key_routing.prepare(spec), spec, backend=self.backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, *routing = inputs
        # One part with all keys.
        routed = self.key_routing.route(q, k, *routing)
        plan = routed.narrow(self.plan, self.tokens)
        out, lse = attention_forward(q, k, v, plan, backend=self.backend)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse, *routing), (plan, routed))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse, *routing = saved.tensors
        plan, routed = saved.extras
        gradients = attention_backward(dout, q, k, v, out, lse, plan=plan, backend=self.backend)
        # All keys are at hand, so that the routing need not observe them before.
        routing_gradient = routed.start(q, *routing)
        routing_gradient.observe(q, k, v, self.plan)
        routing_gradient.add(dout, q, k, v, out, plan=self.plan, tokens=self.tokens)
        return *gradients, *routing_gradient.gradients()

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[4]


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceScan(SequenceAttention):
    """A recurrence over rows in any order, planned once for a sequence and the layers with the same rates.

    segment: the rows, sorted. order: where each of them is found, None if they came sorted; inverse leads back.
    decay: the rates of the local query heads, `[Hq]`.
    """

    segment: Segment
    order: DeviceCopies | None
    inverse: DeviceCopies | None
    decay: Tensor
    backend: str

    @staticmethod
    def build(rows: Rows, decay: Tensor, *, backend: str) -> "SequenceScan":
        """Plan a scan of `rows`, which contain all of their documents."""
        # A recurrence runs along documents: most sequences are in that order already, and need no copies.
        index = segment_order(rows)
        if torch.equal(index, torch.arange(len(rows), device=index.device)):
            return SequenceScan(segment=Segment.of(rows), order=None, inverse=None, decay=decay, backend=backend)
        segment = Segment.of(rows.take(index))
        order, inverse = DeviceCopies(index), DeviceCopies(index.argsort())
        return SequenceScan(segment=segment, order=order, inverse=inverse, decay=decay, backend=backend)

    def prepare(self, spec: InputSpec) -> None:
        for index in (self.order, self.inverse):
            if index is not None:
                index.on(spec.device)
        prepare_recurrence(self.segment, self.decay, spec, backend=self.backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = (_take(x, self.order) for x in inputs)
        out, _ = recurrent_attention_forward(q, k, v, self.segment, self.decay, backend=self.backend)
        return _take(out, self.inverse).to(q.dtype), Saved(inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        dout, q, k, v = (_take(x, self.order) for x in (dout, *saved.tensors))
        # No rows follow, so that the state left has no gradient; none came before, so that the fourth result is 0.
        gradients = recurrent_attention_backward(dout, None, q, k, v, self.segment, self.decay, backend=self.backend)
        return tuple(_take(gradient, self.inverse) for gradient in gradients[:3])


def _take(x: Tensor, index: DeviceCopies | None) -> Tensor:
    return x if index is None else x[index.on(x.device)]

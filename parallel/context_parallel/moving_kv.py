"""Attention where tokens are dealt and keys travel: local queries meet all keys part by part, however these come.

What strategies that move keys and values have in common: each gives the route, how parts come and gradients get home.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Heads, Masked, Mechanism, TokenChoice
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.planning.plan import Plan
from farspan.kernels.sequence_attention import Saved
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.routing import Choice, moves_of_choice
from farspan.parallel.context_parallel.strategy import (
    Chosen,
    DistributedAttention,
    HeadShare,
    Move,
    Queries,
    Sizes,
    Strategy,
)
from farspan.parallel.context_parallel.token_choice import TokenChoiceAttention, token_choice_heads
from farspan.parallel.layout import Shards


class GradReturn(ABC):
    """The way home of the gradients of one rank's backward pass, summed in the accumulation dtype."""

    @abstractmethod
    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        """Add what was found for the part that came last; None: nothing. Called once for each part, in order."""

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the local keys and values, summed over all ranks."""


class KVExchange(ABC):
    """How keys and values come to the ranks, as far as it is known before queries choose."""

    @abstractmethod
    def for_selection(self, selection: BlockSelection | None) -> "KVSchedule":
        """Return the journey of what the local queries chose; every rank has to call."""

    @abstractmethod
    def moves(self, sizes: Sizes, chosen: Chosen) -> tuple[Move, ...]:
        """Return what this rank sends; chosen: of the whole sequence, by a routed mechanism."""

    @abstractmethod
    def working_bytes(self, sizes: Sizes, chosen: Chosen) -> int:
        """Return the most bytes of parts and gradients that are here, or on their way, at once."""


class KVSchedule(KVExchange):
    """How the keys and values of all ranks come to this one, in parts, planned for one dealt sequence.

    plans: local queries against each part. tokens: of the keys of each part, int64 `[keys]`, -1 for padding.
    """

    plans: tuple[Plan, ...]
    tokens: tuple[Tensor, ...]

    def for_selection(self, selection: BlockSelection | None) -> "KVSchedule":
        """Return this journey: it brings whatever may be chosen."""
        return self

    @abstractmethod
    def kv_blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values of each part, of the local ones k `[tokens_local, Hk, D]` and v `[.., Hk, Dv]`.

        Each is used before the next is asked for; what comes next is on its way meanwhile.
        """

    @abstractmethod
    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        """Return the way home of gradients for local keys and values of these shapes."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MovingKVAttention(DistributedAttention):
    """Attention of local queries to the parts of a journey along a route."""

    mechanism: Masked
    shards: Shards
    channel: Channel
    kv_exchange: KVExchange
    choice: Choice
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, *routing = inputs
        choices = self.choice.choose(q, k, *routing)
        kv_schedule = self.kv_exchange.for_selection(choices.selection)
        plans = choices.applied(kv_schedule.plans, kv_schedule.tokens)
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        causal_lse = lse.clone()
        for number, (key, value) in enumerate(kv_schedule.kv_blocks(k, v)):
            if plans[number].is_empty:
                continue
            merge_(out, lse, *attention_forward(q, key, value, plans[number], backend=self.backend))
            if choices.lifetimes is not None:
                part = attention_forward(q, key, value, kv_schedule.plans[number], backend=self.backend)[1]
                causal_lse = torch.logaddexp(causal_lse, part)
        out = out.to(q.dtype)
        learning = () if choices.lifetimes is None else (causal_lse, *routing)
        return out, Saved((q, k, v, out, lse, *learning), (kv_schedule, plans, choices.lifetimes))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse, *learning = saved.tensors
        kv_schedule, plans, lifetimes = saved.kept
        of_types = self.choice.learning(lifetimes, learning)
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        grad_return = kv_schedule.grad_return(k, v)
        for number, (key, value) in enumerate(kv_schedule.kv_blocks(k, v)):
            if plans[number].is_empty:
                grad_return.add(None, None)
                continue
            part_dq, dk, dv = attention_backward(dout, q, key, value, out, lse, plans[number], backend=self.backend)
            dq += part_dq
            if of_types is not None:
                all_causal, tokens = kv_schedule.plans[number], kv_schedule.tokens[number]
                of_types.add(dout, q, key, value, out, plan=all_causal, keys=tokens)
            grad_return.add(dk, dv)
        gradients = dq, *grad_return.finish()
        return gradients if of_types is None else (*gradients, of_types.gradient())

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[4]

    def moves(self, sizes: Sizes, chosen: Chosen = None) -> tuple[Move, ...]:
        """What the route moves, and what all ranks sum to choose by and to learn from."""
        choice = moves_of_choice(self.mechanism, self.shards.rows, self.heads, sizes, self.channel)
        return *self.kv_exchange.moves(sizes, chosen), choice

    @property
    def queries(self) -> Queries:
        return Queries(self.shards.index[self.channel.rank], self.heads.query)

    def working_bytes(self, sizes: Sizes, chosen: Chosen = None) -> int:
        """Backward: what is on its way, the gradient of the queries and that of the part at hand."""
        dq = self.tokens_local * self.heads.query * sizes.head_dim * sizes.accumulation_bytes
        return dq + self.kv_exchange.working_bytes(sizes, chosen)


class KVMovingStrategy(Strategy):
    """Moves keys and values, along the route that it gives; of gathered mechanisms, those that were chosen."""

    name: ClassVar[str]
    fallback_strategy = "state"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if isinstance(mechanism, (Masked, TokenChoice)):
            return None
        return (
            f"strategy {cls.name!r} moves keys and values, which {type(mechanism).__name__} does not attend to; "
            "set parallel.strategy='state' or 'ulysses'."
        )

    @abstractmethod
    def kv_exchange(self, mechanism: Masked, shards: Shards, share: HeadShare) -> KVExchange:
        """Plan how the keys of a dealt sequence come to this rank's queries."""

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        if isinstance(mechanism, TokenChoice):
            among = HeadShare.whole(token_choice_heads(share.here))
            return TokenChoiceAttention(
                tokens_local=shards.tokens_local,
                heads=share.here,
                routing_width=mechanism.routing_width,
                mechanism=mechanism,
                shards=shards,
                channel=self.channel,
                strategy=self.name,
                plan=lambda dealt: self.plan(mechanism.among(), dealt, among, backend=backend),
            )
        assert isinstance(mechanism, Masked)
        return MovingKVAttention(
            tokens_local=shards.tokens_local,
            heads=share.here,
            routing_width=mechanism.routing_width,
            mechanism=mechanism,
            shards=shards,
            channel=self.channel,
            kv_exchange=self.kv_exchange(mechanism, shards, share),
            choice=Choice.of(mechanism, shards, share, self.channel, strategy=self.name),
            backend=backend,
        )


class KeysAndValues:
    """Keys `[tokens, Hk, D]` and values `[tokens, Hk, Dv]` as views of one flat buffer, sent as one message."""

    def __init__(self, buffer: Tensor, key_shape: torch.Size, value_shape: torch.Size) -> None:
        self.buffer = buffer
        self.key, self.value = buffer.split((key_shape.numel(), value_shape.numel()))
        self.key, self.value = self.key.view(key_shape), self.value.view(value_shape)

    @staticmethod
    def pack(key: Tensor, value: Tensor) -> "KeysAndValues":
        return KeysAndValues(torch.cat((key.reshape(-1), value.reshape(-1))), key.shape, value.shape)

    @staticmethod
    def no_gradients(key: Tensor, value: Tensor) -> "KeysAndValues":
        """Return gradients of 0, in the accumulation dtype."""
        buffer = torch.zeros(key.numel() + value.numel(), dtype=accumulation_dtype(key.dtype), device=key.device)
        return KeysAndValues(buffer, key.shape, value.shape)

    def like(self, buffer: Tensor) -> "KeysAndValues":
        """Return another buffer, of the same shapes."""
        return KeysAndValues(buffer, self.key.shape, self.value.shape)

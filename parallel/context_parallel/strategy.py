"""Strategy: how queries get at the keys of other ranks; one file each in `strategies/`.

A kind of mechanism plans its attention with a `ShardedPlanner`, which hands each part of it to the strategy:

    Strategy.prepare -> Mechanism.plan(planner) -> planner.attend(mask, routing) -> Strategy.attend -> ring, fetch, ...
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.errors import ConfigError
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import (
    AttentionPlanner,
    Heads,
    HeadShare,
    InputSpec,
    KeyRouting,
    RoutingSource,
    Saved,
    SequenceAttention,
    Sizes,
    no_routing,
)
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import expand
from farspan.parallel.comm import Channel, GradCommDtype
from farspan.parallel.layout import Shards
from farspan.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """Bytes that one rank sends in one attention layer."""

    forward: int
    backward: int

    @staticmethod
    def total(volumes: Sequence["Volume"]) -> "Volume":
        return Volume(forward=sum(of.forward for of in volumes), backward=sum(of.backward for of in volumes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Move(Volume):
    """What one rank sends over a channel; overlapped: while it computes, so that only the longer of both takes time."""

    channel: Channel
    overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Queries:
    """tokens: of the sequence, int64 `[queries]`, -1 for padding. heads: how many query heads of each."""

    tokens: Tensor
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedAttention(SequenceAttention):
    """Attention over one sharded sequence, planned: called with the local rows, differentiable.

    Inputs and results are of these rows, T being `tokens_local`, and gradients are summed over all ranks. Every rank
    has to make the same calls, `lse` included, as any of them may send.
    """

    planner: "ShardedPlanner"
    routing_width: int

    @property
    def tokens_local(self) -> int:
        return self.planner.shards.tokens_local

    @property
    def heads(self) -> Heads:
        return self.planner.share.local_heads

    @property
    def channel(self) -> Channel:
        return self.planner.strategy.channel

    @property
    def backend(self) -> str:
        return self.planner.backend

    @property
    def queries(self) -> Queries:
        """The queries that this rank attends with."""
        return Queries(self.planner.tokens, self.heads.query)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *routing: Tensor) -> Tensor:
        """Attend q `[tokens_local, Hq, D]` to k `[.., Hk, D]` and v `[.., Hk, Dv]`; return `[tokens_local, Hq, Dv]`.

        A mechanism with a router takes its numbers too, `[tokens_local, Hk, routing_width]` in the accumulation dtype.
        Raises ValueError on other shapes, or on tensors of different dtypes, before anything is sent.
        """
        self._check(q, k, v, routing)
        return differentiable(self, q, k, v, *routing)

    @abstractmethod
    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """Return what this rank sends: the strategy's formula, which a test compares with counted bytes.

        routing: of the full sequence; asked for only where messages depend on it.
        """

    @abstractmethod
    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """Return the most bytes that a pass holds at once besides its inputs, results and what the kernel needs."""

    def volume(self, sizes: Sizes, routing: RoutingSource = no_routing) -> Volume:
        """Return the bytes that this rank sends, all moves together."""
        return Volume.total(self.moves(sizes, routing))

    def _check(self, q: Tensor, k: Tensor, v: Tensor, routing: tuple[Tensor, ...]) -> None:
        of_queries, of_keys = (self.tokens_local, self.heads.query), (self.tokens_local, self.heads.kv)
        rows_and_heads = [x.shape[:-1] for x in (q, k, v)]
        if rows_and_heads != [of_queries, of_keys, of_keys] or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"this attention is planned for q {[*of_queries]} x D, k {[*of_keys]} x D and v {[*of_keys]} x Dv; "
                f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"attention wants q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
        # A router works in the accumulation dtype, so that equal tokens have equal numbers: ties are real.
        wanted = [((*of_keys, self.routing_width), accumulation_dtype(q.dtype))] if self.routing_width else []
        if [(tuple(x.shape), x.dtype) for x in routing] != wanted:
            raise ValueError(
                f"besides q, k and v this attention wants {_named(wanted) or 'nothing'}; "
                f"got {_named([(tuple(x.shape), x.dtype) for x in routing]) or 'nothing'}"
            )


def _named(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in tensors)


def differentiable(attention: SequenceAttention, *inputs: Tensor) -> Tensor:
    """Return the output of a planned attention, through which autograd passes to all inputs."""
    return _AttentionFunction.apply(attention, *inputs)  # pyright: ignore[reportReturnType]


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Kernels sum in the dtypes that they choose: torch.autocast would round what is between."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend: SequenceAttention, *inputs: Tensor) -> Tensor:
        with _no_autocast(inputs[0].device.type):
            out, saved = attend.forward(*inputs)
        ctx.save_for_backward(*saved.tensors)
        ctx.attend, ctx.extras, ctx.dtypes = attend, saved.extras, [x.dtype for x in inputs]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Sums in the accumulation dtype are rounded to the dtype of the inputs here, once.
        with _no_autocast(dout.device.type):
            gradients = ctx.attend.backward(dout, Saved(ctx.saved_tensors, ctx.extras))
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalAttention(DistributedAttention):
    """Attention to rows of this rank alone, which sends nothing."""

    attention: SequenceAttention

    def prepare(self, spec: InputSpec) -> None:
        self.attention.prepare(spec)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        return self.attention.forward(*inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return self.attention.backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor | None:
        return self.attention.lse(saved)

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        return ()

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ComposedAttention(LocalAttention):
    """Attention that a kind makes of others, which are planned under the same strategy and may send."""

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """What the branches send, one after another, and the kind's own exchanges and sums over all ranks."""
        found = self.attention.composition(sizes, routing)
        # Branches run one after another, so that their moves add up.
        of_branches = [
            move
            for attention, of_branch in found.branches
            for move in self._distributed(attention).moves(sizes, of_branch)
        ]
        forward, backward = (
            sum(size for owner, size in enumerate(sizes) if owner != self.channel.rank) for sizes in found.exchanged
        )
        exchanged = Move(forward=forward, backward=backward, channel=self.channel)
        return *of_branches, exchanged, all_reduce_move(found.all_reduced, self.channel)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """The most of any branch, on top of the kind's own."""
        found = self.attention.composition(sizes, routing)
        of_branches = (self._distributed(attention).working_bytes(sizes, of) for attention, of in found.branches)
        return found.working_bytes + max(of_branches, default=0)

    def _distributed(self, attention: SequenceAttention) -> DistributedAttention:
        return self.planner.distributed(attention, self.routing_width)


def all_reduce_move(all_reduced: tuple[int, int], channel: Channel) -> Move:
    """Return what a rank sends in sums over all ranks of tensors of these bytes, forward and backward: 2 (P-1)/P."""
    # A reduce-scatter and an all-gather, each of (P-1)/P of the bytes.
    forward, backward = (2 * (channel.size - 1) * total // channel.size for total in all_reduced)
    return Move(forward=forward, backward=backward, channel=channel)


class Strategy(ABC):
    """Moves rows over a channel; every rank of the channel makes the same calls in the same order.

    A strategy that shards tokens implements `attend` or `scan`, the parts that kinds make their attention of; one that
    does otherwise implements `plan_with`.
    """

    name: ClassVar[str]
    """Its messages are counted under it."""
    serves: ClassVar[frozenset[Access]] = frozenset(Access)
    """The accesses to other tokens that it can do."""
    not_served: ClassVar[str] = ""
    """How the sentence `strategy NAME ...` goes on about a `{mechanism}` of other accesses, and what to change."""
    fallback_strategy: ClassVar[str | None] = None
    """The strategy that serves layers whose mechanism this one does not take, if there is one."""

    def __init__(self, channel: Channel, *, grad_comm_dtype: GradCommDtype = "accumulation") -> None:
        """grad_comm_dtype: in which gradients of keys and values travel; they are summed in float32 or wider."""
        self.channel = channel
        self.grad_comm_dtype: GradCommDtype = grad_comm_dtype
        self.rounds_gradients = grad_comm_dtype == "compute"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        """Return why these cannot run together, as a sentence that says what to change, or None if they can.

        Here only accesses decide. inner: the ranks of the inner axis, for strategies of two levels.
        """
        if mechanism.accesses <= cls.serves:
            return None
        return f"strategy {cls.name!r} {cls.not_served.format(mechanism=type(mechanism).__name__)}"

    def prepare(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> DistributedAttention:
        """Plan the attention of one sharded sequence; the result serves every layer of that mechanism.

        Raises ConfigError with the `unsupported_reason` of the strategy or of the mechanism, ValueError for a sequence
        sharded over another number of ranks.
        """
        if heads.query % heads.kv:
            raise ConfigError(f"{heads.query} query heads cannot share {heads.kv} KV heads evenly: change one of them.")
        # Refused before anything is planned, let alone sent.
        longest = int(shards.rows.position.max()) + 1 if len(shards.rows) else 0
        for reason in (
            self.unsupported_reason(mechanism, heads, self.channel.size, self.channel.inner_size),
            mechanism.unsupported_reason(heads, longest),
        ):
            if reason is not None:
                raise ConfigError(reason)
        if shards.degree != self.channel.size:
            raise ValueError(f"a sequence sharded over {shards.degree} ranks cannot run on {self.channel.size}")
        return self.plan(mechanism, shards, HeadShare.all(heads), backend=backend)

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        """Plan like `prepare`, checks left out, for some of the heads."""
        tokens = shards.index[self.channel.rank]
        planner = ShardedPlanner(
            global_rows=shards.rows, tokens=tokens, share=share, backend=backend, strategy=self, shards=shards
        )
        return self.plan_with(planner, mechanism)

    def plan_with(self, planner: "ShardedPlanner", mechanism: Mechanism) -> DistributedAttention:
        """Plan the attention of the planner's rows and heads."""
        return planner.distributed(mechanism.plan(planner), mechanism.routing_width)

    def attend(
        self, planner: "ShardedPlanner", attention_mask: AttentionMask, key_routing: KeyRouting
    ) -> DistributedAttention:
        """Plan softmax attention to the keys that a mask (of the local heads) shows and the routing leaves."""
        raise NotImplementedError(f"strategy {self.name!r} attends to no keys")

    def scan(self, planner: "ShardedPlanner", decay: Tensor) -> DistributedAttention:
        """Plan a recurrence with these rates of the local heads, float64 `[Hq]`."""
        raise NotImplementedError(f"strategy {self.name!r} passes no state")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedPlanner(AttentionPlanner):
    """Plans under a strategy that shards the tokens of a sequence over the ranks of its channel."""

    strategy: Strategy
    shards: Shards

    def attend(self, attention_mask: AttentionMask, key_routing: KeyRouting) -> DistributedAttention:
        return self.strategy.attend(self, attention_mask.of_heads(self.share.slice), key_routing)

    def plan_of(
        self, attention_mask: AttentionMask, queries: Tensor, keys: Tensor, selection: BlockSelection | None = None
    ) -> Plan:
        """Plan attention of queries to keys, both tokens of the sequence, under a mask (of the local heads)."""
        rows, heads = self.global_rows, self.share.local_heads.query
        return Plan.build(rows.take(queries), rows.take(keys), attention_mask, heads=heads, selection=selection)

    def scan(self, decay: Tensor) -> DistributedAttention:
        return self.strategy.scan(self, decay)

    def all_reduce_sum(self, x: Tensor, *, kind: str) -> Tensor:
        return self.strategy.channel.all_reduce(x, kind=f"{self.strategy.name}_{kind}")

    def of_tokens(self, rows: Rows, token: Tensor) -> Self:
        # Rows stay where their tokens are: to plan among them moves nothing.
        shards = shard_with_tokens(rows, token, self.shards)
        tokens = shards.index[self.strategy.channel.rank]
        return replace(self, global_rows=rows, tokens=tokens, shards=shards)

    @property
    def tokens_by_owner(self) -> Tensor:
        return self.shards.index

    def all_to_all(self, x: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str) -> Tensor:
        kind = f"{self.strategy.name}_{kind}"
        return self.strategy.channel.start_all_to_all(x, sent=sent, received=received, kind=kind).wait()

    def distributed(self, attention: SequenceAttention, routing_width: int) -> DistributedAttention:
        """Return attention that this planner has planned with its costs: that of a strategy has them already."""
        # What a strategy planned knows its costs; what a kind composed has those of its branches.
        if isinstance(attention, DistributedAttention):
            return attention
        return ComposedAttention(planner=self, routing_width=routing_width, attention=attention)


def shard_with_tokens(rows: Rows, token: Tensor, shards: Shards) -> Shards:
    """Shard another sequence so that each row lies on the rank of its `token`, int64 `[rows]`, of a sharded one.

    Rows stay in their order; ranks with fewer rows than others are padded.
    """
    # A slot counts the rows of all ranks set end to end: [P, T] -> [P * T]
    owner = shards.slots()[token] // shards.tokens_local
    counts = owner.bincount(minlength=shards.degree)
    # At least one row, of padding if need be: transfers are not empty.
    index = torch.full((shards.degree, max(int(counts.max()), 1)), -1)
    order = owner.argsort(stable=True)
    # Rows by owner, and the number of each among those of its owner.
    rank, nth = expand(counts)
    index[rank, nth] = order
    return Shards(rows=rows, index=index)


def grid_unsupported_reason(strategy: str, degree: int, inner: int) -> str | None:
    """Return why `degree` ranks with an inner axis of `inner` are no grid, None if they are one."""
    if 1 < inner < degree and degree % inner == 0:
        return None
    return (
        f"strategy {strategy!r} needs a grid of ranks, but parallel.context={degree} and "
        f"parallel.context_inner={inner}: the second must divide the first and lie between 1 and it."
    )


STRATEGIES: Registry[type[Strategy]] = Registry(
    "context-parallel strategy", "farspan.parallel.context_parallel.strategies"
)

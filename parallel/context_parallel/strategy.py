"""Strategy: how queries meet the keys that other ranks hold; one file each in `context/`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.errors import ConfigError
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Heads, Mechanism, Routed, TokenChoice
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.sequence_attention import Saved, SequenceAttention
from farspan.parallel.comm import Channel, GradCommDtype
from farspan.parallel.layout import Shards
from farspan.registry import Registry


@dataclass(frozen=True, slots=True)
class Sample:
    """What one in so many queries of a whole sequence chose; other queries have no unit."""

    selection: BlockSelection
    one_in: int


Chosen = BlockSelection | Sample | Tensor | None
"""What a mechanism chose of a whole sequence: a routed one's blocks; tokens, bool `[tokens, Hk]`, of a gathered one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of one row: the numbers of a key and of a value, and the bytes of a number as it is and as it is summed."""

    head_dim: int
    value_dim: int
    element_bytes: int
    accumulation_bytes: int

    @staticmethod
    def of(dtype: torch.dtype, head_dim: int, value_dim: int) -> "Sizes":
        """Return the sizes of tensors of `dtype`."""
        return Sizes(
            head_dim=head_dim,
            value_dim=value_dim,
            element_bytes=dtype.itemsize,
            accumulation_bytes=accumulation_dtype(dtype).itemsize,
        )

    @property
    def kv_width(self) -> int:
        """Numbers in the key and the value of one head."""
        return self.head_dim + self.value_dim

    def gradient_bytes(self, grad_comm_dtype: GradCommDtype) -> int:
        """Return the bytes of one number of a gradient that travels between ranks."""
        return self.element_bytes if grad_comm_dtype == "compute" else self.accumulation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """Bytes that one rank sends in one attention layer."""

    forward: int
    backward: int

    @staticmethod
    def total(volumes: Iterable["Volume"]) -> "Volume":
        """Return the sum."""
        forward, backward = zip((0, 0), *((volume.forward, volume.backward) for volume in volumes), strict=True)
        return Volume(forward=sum(forward), backward=sum(backward))


@dataclass(frozen=True, slots=True)
class Move:
    """What one rank sends over a channel; overlapped: while it computes, so that the longer of both counts."""

    volume: Volume
    channel: Channel
    overlapped: bool


@dataclass(frozen=True, slots=True)
class Queries:
    """tokens: of the sequence, int64 `[queries]`, -1 for padding. heads: how many query heads of each."""

    tokens: Tensor
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShare:
    """The query heads `which`, of `all_heads`'s, that are attended to here, with their KV heads."""

    all_heads: Heads
    which: range

    @staticmethod
    def whole(heads: Heads) -> "HeadShare":
        return HeadShare(all_heads=heads, which=range(heads.query))

    @property
    def slice(self) -> slice:
        return slice(self.which.start, self.which.stop)

    @property
    def kv_heads(self) -> range:
        """Their KV heads."""
        group = self.all_heads.query // self.all_heads.kv
        return range(self.which.start // group, (self.which.stop - 1) // group + 1)

    @property
    def here(self) -> Heads:
        """How many they are."""
        return Heads(query=len(self.which), kv=len(self.kv_heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedAttention(SequenceAttention):
    """Attention over one dealt sequence, planned: called with the rows that this rank holds, differentiable.

    Inputs and results are of these rows, T being `tokens_local`, and gradients are summed over all ranks. Every rank
    has to make the same calls, `lse` included, as any of them may send.
    """

    tokens_local: int
    heads: Heads
    routing_width: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *routing: Tensor) -> Tensor:
        """Attend q `[tokens_local, Hq, D]` to k `[.., Hk, D]` and v `[.., Hk, Dv]`; return `[tokens_local, Hq, Dv]`.

        A mechanism with a router takes its numbers too, `[tokens_local, Hk, routing_width]` in the accumulation dtype.
        Raises ValueError on other shapes, or on tensors of different dtypes, before anything is sent.
        """
        self._check(q, k, v, routing)
        return _AttentionFunction.apply(self, q, k, v, *routing)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def moves(self, sizes: Sizes, chosen: Chosen = None) -> tuple[Move, ...]:
        """Return what this rank sends: the strategy's formula, which a test compares with counted bytes.

        chosen: of the whole sequence, by a mechanism that chooses; strategies that move all keys do without.
        """

    @property
    @abstractmethod
    def queries(self) -> Queries:
        """The queries that this rank attends with."""

    @abstractmethod
    def working_bytes(self, sizes: Sizes, chosen: Chosen = None) -> int:
        """Return the most bytes that a pass holds at once besides its inputs, results and what the kernel needs."""

    def volume(self, sizes: Sizes, chosen: Chosen = None) -> Volume:
        """Return the bytes that this rank sends, all moves together."""
        return Volume.total(move.volume for move in self.moves(sizes, chosen))

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
        wanted = [((*of_keys, self.routing_width), accumulation_dtype(q.dtype))] if self.routing_width else []
        if [(tuple(x.shape), x.dtype) for x in routing] != wanted:
            raise ValueError(
                f"besides q, k and v this attention wants {_named(wanted) or 'nothing'}; "
                f"got {_named([(tuple(x.shape), x.dtype) for x in routing]) or 'nothing'}"
            )


def _named(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in tensors)


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend: DistributedAttention, *inputs: Tensor) -> Tensor:
        out, saved = attend.forward(*inputs)
        ctx.save_for_backward(*saved.tensors)
        ctx.attend, ctx.kept, ctx.dtypes = attend, saved.kept, [x.dtype for x in inputs]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.attend.backward(dout, Saved(ctx.saved_tensors, ctx.kept))
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))


class Strategy(ABC):
    """Moves rows over a channel; every rank of the channel makes the same calls in the same order."""

    shards_heads: ClassVar[bool] = False
    """Whether a rank attends to the whole sequence, with some of the heads."""
    moves_selected_blocks: ClassVar[bool] = False
    """Whether what moves depends on the blocks that a routed mechanism chose."""

    fallback_strategy: ClassVar[str | None] = None
    """The strategy that serves layers whose mechanism this one does not take, if there is one."""

    @classmethod
    def moves_chosen(cls, mechanism: Mechanism) -> bool:
        """Return whether what moves depends on what the mechanism chose."""
        if isinstance(mechanism, TokenChoice):
            return not cls.shards_heads
        return isinstance(mechanism, Routed) and cls.moves_selected_blocks

    def __init__(self, channel: Channel, *, grad_comm_dtype: GradCommDtype = "accumulation") -> None:
        """grad_comm_dtype: in which gradients of keys and values travel; they are summed in float32 or wider."""
        self.channel = channel
        self.grad_comm_dtype: GradCommDtype = grad_comm_dtype

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        """Return why these cannot run together, as a sentence that says what to change, or None if they can.

        inner: the ranks of the inner axis, for strategies of two levels.
        """

    def prepare(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> DistributedAttention:
        """Plan the attention of one dealt sequence; the result serves every layer of that mechanism.

        Raises ConfigError with the `unsupported_reason` of the strategy or of the mechanism, ValueError for a sequence
        sharded over another number of ranks.
        """
        if heads.query % heads.kv:
            raise ConfigError(f"{heads.query} query heads cannot share {heads.kv} KV heads evenly: change one of them.")
        longest = int(shards.rows.position.max()) + 1 if len(shards.rows) else 0
        for reason in (
            self.unsupported_reason(mechanism, heads, self.channel.size, self.channel.inner_size),
            mechanism.unsupported_reason(heads, longest),
        ):
            if reason is not None:
                raise ConfigError(reason)
        if shards.degree != self.channel.size:
            raise ValueError(f"a sequence dealt to {shards.degree} ranks cannot run on {self.channel.size}")
        return self.plan(mechanism, shards, HeadShare.whole(heads), backend=backend)

    @abstractmethod
    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        """Do what `prepare` says, for what was checked and some of the heads."""


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

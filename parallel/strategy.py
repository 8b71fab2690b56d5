"""Strategy: how queries meet the keys that other ranks hold; one file each in `context/`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.errors import ConfigError
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.registry import Registry
from farspan.kernels.whole import Saved, WholeAttention
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """One rank's q `[tokens_local, Hq, head_dim]`, k and v `[tokens_local, Hk, ...]` before any exchange."""

    tokens_local: int
    heads: Heads
    head_dim: int
    value_dim: int
    element_bytes: int
    accumulation_bytes: int
    routing_width: int
    total_bytes: int
    """Of what a routed mechanism sums over all ranks to choose by."""
    gradient_total_bytes: int
    """Of what an ageing one sums over all ranks to learn from."""

    @property
    def kv_elements(self) -> int:
        """Numbers in a rank's keys and values."""
        return self.tokens_local * self.heads.kv * (self.head_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """Bytes that one rank sends in one attention layer."""

    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Attend(WholeAttention):
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
        return _AttendFunction.apply(self, q, k, v, *routing)  # pyright: ignore[reportReturnType]

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


class _AttendFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend: Attend, *inputs: Tensor) -> Tensor:
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

    deals_heads: ClassVar[bool] = False
    """Whether a rank attends to the whole sequence, with some of the heads."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    @abstractmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        """Return why these cannot run together, as a sentence that says what to change, or None if they can."""

    @classmethod
    @abstractmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        """Return the bytes that a rank sends: the strategy's formula, which a test compares with counted bytes."""

    def prepare(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        """Plan the attention of one dealt sequence; the result serves every layer of that mechanism.

        Raises ConfigError where `refusal` has a reason, ValueError for a sequence dealt to another number of ranks.
        """
        reason = self.refusal(mechanism, heads, self.channel.size)
        if reason is not None:
            raise ConfigError(reason)
        if shards.degree != self.channel.size:
            raise ValueError(f"a sequence dealt to {shards.degree} ranks cannot run on {self.channel.size}")
        return self._plan(mechanism, shards, heads, backend=backend)

    @abstractmethod
    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        """Do what `prepare` says, for what was checked."""


STRATEGIES: Registry[type[Strategy]] = Registry("context-parallel strategy", "farspan.parallel.context")

"""Strategy: how queries meet the keys that other ranks hold; one file each in `context/`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.errors import ConfigError
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.plan import Plan
from farspan.kernels.registry import Registry
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Numbers of query heads and of key/value heads; `query % kv == 0`."""

    query: int
    kv: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """One rank's q `[tokens_local, Hq, head_dim]`, k and v `[tokens_local, Hk, ...]` before any exchange."""

    tokens_local: int
    heads: Heads
    head_dim: int
    value_dim: int
    element_bytes: int
    accumulation_bytes: int
    total_bytes: int
    """Of what a routed mechanism sums over all ranks to choose by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """Bytes that one rank sends in one attention layer."""

    forward: int
    backward: int


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward pass keeps for its backward pass; nothing in it grows with the square of the sequence.

    plans: with what was selected, in the order in which the strategy needs them.
    """

    tensors: tuple[Tensor, ...]
    plans: tuple[Plan, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attend(ABC):
    """Attention over one dealt sequence, planned: called with the rows that this rank holds, differentiable."""

    tokens_local: int
    heads: Heads

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend q `[tokens_local, Hq, D]` to k `[.., Hk, D]` and v `[.., Hk, Dv]`; return `[tokens_local, Hq, Dv]`.

        Raises ValueError on other shapes, or on tensors of different dtypes, before anything is sent.
        """
        self._check(q, k, v)
        return _AttendFunction.apply(q, k, v, self)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Return out `[tokens_local, Hq, Dv]` in the dtype of q, and what `backward` needs."""

    @abstractmethod
    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) of this rank's rows, summed over all ranks, in the accumulation dtype or that of q."""

    @abstractmethod
    def lse(self, saved: Saved) -> Tensor:
        """Return the log-sum-exp `[tokens_local, Hq]` of this rank's rows; every rank has to ask, as this may send."""

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        of_queries, of_keys = (self.tokens_local, self.heads.query), (self.tokens_local, self.heads.kv)
        rows_and_heads = [x.shape[:-1] for x in (q, k, v)]
        if rows_and_heads != [of_queries, of_keys, of_keys] or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"this attention is planned for q {[*of_queries]} x D, k {[*of_keys]} x D and v {[*of_keys]} x Dv; "
                f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"attention wants q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")


class _AttendFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        out, saved = attend.forward(q, k, v)
        ctx.save_for_backward(*saved.tensors)
        ctx.attend, ctx.plans, ctx.dtype = attend, saved.plans, q.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv = ctx.attend.backward(dout, Saved(ctx.saved_tensors, ctx.plans))
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None


class Strategy(ABC):
    """Moves rows over a channel; every rank of the channel makes the same calls in the same order."""

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

"""The contract between kinds of mechanism and strategies: what a kind may ask for, and what it hands back.

A kind plans its attention with an `AttentionPlanner`, which knows where the rows and heads of one sequence lie: all of
them in one process (`sequence_attention.py`), or sharded over ranks. The kind never learns which. Two attentions of the
same inputs, added, run under every strategy that runs both:

    def plan(self, planner):
        return _Sum(self.first.plan(planner), self.second.plan(planner))    # a SequenceAttention: forward, backward

Legend: T local query tokens, Hq query heads, Hk KV heads, D head dim, Dv value head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planning.plan import Plan

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums a tensor over all owners of a sequence's rows, each of which has computed it from its own rows."""


def identity(x: Tensor) -> Tensor:
    """The sum over a single owner."""
    return x


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Numbers of query heads and of key/value heads; `query % kv == 0`."""

    query: int
    kv: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShare:
    """The query heads `head_range`, of `all_heads`, that are attended with here, and their KV heads."""

    all_heads: Heads
    head_range: range

    @staticmethod
    def all(heads: Heads) -> "HeadShare":
        return HeadShare(all_heads=heads, head_range=range(heads.query))

    @property
    def slice(self) -> slice:
        return slice(self.head_range.start, self.head_range.stop)

    @property
    def kv_heads(self) -> range:
        # Query heads 0 to G - 1 share KV head 0, and so on; a share may begin inside such a group.
        group = self.all_heads.query // self.all_heads.kv
        return range(self.head_range.start // group, (self.head_range.stop - 1) // group + 1)

    @property
    def local_heads(self) -> Heads:
        return Heads(query=len(self.head_range), kv=len(self.kv_heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Elements of a key and of a value, and bytes of an element as it is and as it is summed."""

    head_dim: int
    value_dim: int
    element_bytes: int
    accumulation_bytes: int

    @staticmethod
    def of(dtype: torch.dtype, head_dim: int, value_dim: int) -> "Sizes":
        return Sizes(
            head_dim=head_dim,
            value_dim=value_dim,
            element_bytes=dtype.itemsize,
            accumulation_bytes=accumulation_dtype(dtype).itemsize,
        )

    @property
    def kv_width(self) -> int:
        """Elements of one head's key and value: D + Dv."""
        return self.head_dim + self.value_dim

    def gradient_bytes(self, *, rounded: bool) -> int:
        """Bytes of an element of a gradient that is sent."""
        return self.element_bytes if rounded else self.accumulation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """What q `[T, Hq, D]`, k `[S, Hk, D]` and v `[S, Hk, Dv]` of all layers are, before any exists."""

    device: torch.device
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    value_dim: int

    @staticmethod
    def of(q: Tensor, v: Tensor) -> "InputSpec":
        return InputSpec(device=q.device, dtype=q.dtype, kv_heads=v.shape[1], head_dim=q.shape[2], value_dim=v.shape[2])


# Routing of a full sequence: for the costs of a plan, which one process can compute for all ranks.


class Routing:
    """What a mechanism selects by content in a full sequence; in this base class nothing. A kind has its own class."""

    def of_heads(self, share: HeadShare) -> "Routing":
        """Return the part of the routing that these heads need."""
        return self

    def tensors(self) -> list[Tensor]:
        """Return the selection as tensors, to compare it between devices."""
        return []


RoutingSource = Callable[[], Routing]
"""Computed on demand: only what depends on the routing asks for it, as it may cost as much as the attention."""


def no_routing() -> Routing:
    return Routing()


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward pass saves for its backward pass; nothing in it grows with the square of the sequence.

    extras: everything but tensors to save, such as plans with a selection.
    """

    tensors: tuple[Tensor, ...]
    extras: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Composition:
    """The attentions that an attention is made of, and its own costs on top of theirs.

    branches: run one after another, each with its routing. all_reduced: bytes of the tensors that are summed over all
    owners of rows, forward and backward. exchanged: bytes for each owner, this one included, forward and backward.
    working_bytes: held while a branch runs.
    """

    branches: Sequence[tuple["SequenceAttention", RoutingSource]] = ()
    all_reduced: tuple[int, int] = (0, 0)
    exchanged: tuple[Sequence[int], Sequence[int]] = ((), ())
    working_bytes: int = 0


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

    def prepare(self, spec: InputSpec) -> None:
        """Make what every layer needs of the sequence, ahead of the first, which makes what is left out.

        Sends nothing, waits for no device and only copies to it, so that a thread of its own can prepare.
        """
        return

    def lse(self, saved: Saved) -> Tensor | None:
        """Return the log-sum-exp `[T, Hq]`, None where there is no single softmax; tests compare it with the truth."""
        return None

    def composition(self, sizes: Sizes, routing: RoutingSource) -> Composition:
        """Return the other attentions that this one plans; for the bytes and the memory under a strategy."""
        return Composition()


# Routing of one pass, found by all owners of rows together. A kind that narrows a mask has three classes of its own:
#   KeyRouting       made with the plan          route(q, k, routing) -> RoutedKeys
#   RoutedKeys       made in the forward pass    narrow(plan) of each part of the keys; start, resume -> RoutingGradient
#   RoutingGradient  in both passes              observe each part, later add each part; gradients


class RoutingGradient:
    """Collects the gradient of the routing over parts of the keys; in this base class there is none."""

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """Tensors that the forward pass saves and `RoutedKeys.resume` gets back."""
        return ()

    def observe(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
        """See a part of the keys under the mask alone; all parts must be observed before any is added."""

    def add(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, plan: Plan, tokens: Tensor) -> None:
        """Add a part of the keys, of these tokens of the sequence, in the backward pass; plan: under the mask alone."""

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradient of routing `[T, Hk, routing_width]`, if there is a routing; every owner has to call."""
        return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedKeys:
    """The keys that a mask shows, narrowed by content for one pass; here to the blocks that local queries select."""

    selection: BlockSelection | PackedSelection | None = None

    def narrow(self, plan: Plan, tokens: Tensor) -> Plan:
        """Narrow a plan of the local queries against the keys of these tokens, int64 `[keys]`, -1 for padding."""
        return plan if self.selection is None else plan.with_selection(self.selection)

    def prepare(self, plan: Plan, tokens: Tensor, device: torch.device) -> tuple[Plan, ...]:
        """Make what passes need to attend to the keys of these tokens, ahead of them; return the plans they go by."""
        return (self.narrow(plan, tokens),)

    def start(self, q: Tensor, *routing: Tensor) -> RoutingGradient:
        return RoutingGradient()

    def resume(self, *saved: Tensor) -> RoutingGradient:
        """Return what `start` returned, after the keys that it has observed."""
        return RoutingGradient()


class KeyRouting:
    """How a mechanism narrows the keys that its mask shows, by content; in this base class it does not.

    selects_blocks: whether the local queries select blocks of keys. routing_width: of the fourth input, 0 without.
    """

    selects_blocks: bool = False
    routing_width: int = 0

    @cached_property
    def key_blocks(self) -> BlockPartition:
        """The blocks of keys that queries select from."""
        raise NotImplementedError(f"{type(self).__name__} selects no blocks")

    def all_reduced(self, sizes: Sizes) -> tuple[int, int]:
        """Return the bytes of the tensors that `route` and the gradient sum over all owners of rows."""
        return 0, 0

    def prepare(self, spec: InputSpec) -> RoutedKeys | None:
        """Make what routing needs, see `SequenceAttention.prepare`; return the keys that it will leave.

        What depends on content is on the meta device there. None if more than that is unknown.
        """
        return RoutedKeys()

    def route(self, q: Tensor, k: Tensor, *routing: Tensor) -> RoutedKeys:
        """Route by the local q, k and routing; every owner has to call."""
        return RoutedKeys()


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlanner(ABC):
    """Where the rows and heads of one sequence lie, and how attention among them is planned there.

    global_rows: the full sequence, known to all owners. tokens: of the sequence behind each local row, int64 `[T]`;
    -1 is padding. share: the local query heads.
    """

    global_rows: Rows
    tokens: Tensor
    share: HeadShare
    backend: str

    @cached_property
    def local_rows(self) -> Rows:
        return self.global_rows.take(self.tokens)

    @property
    def key_rows(self) -> Rows:
        """The rows of the local keys: those of the queries."""
        return self.local_rows

    @cached_property
    def row_of_token(self) -> Tensor:
        """The local row of each token of the sequence, int64 `[tokens]`; -1 where another owner has it."""
        # The inverse of `tokens`, as far as there is one.
        row = torch.full((len(self.global_rows),), -1)
        row[self.tokens[self.tokens >= 0]] = torch.arange(len(self.tokens))[self.tokens >= 0]
        return row

    @abstractmethod
    def attend(self, attention_mask: AttentionMask, key_routing: KeyRouting) -> SequenceAttention:
        """Plan softmax attention to the keys that a mask (of all heads) shows and the routing leaves."""

    @abstractmethod
    def scan(self, decay: Tensor) -> SequenceAttention:
        """Plan a recurrence with these rates of the local query heads, float64 `[Hq]`."""

    @abstractmethod
    def all_reduce_sum(self, x: Tensor, *, kind: str) -> Tensor:
        """Return the sum of x over all owners of rows; its bytes are counted under `kind`."""

    @abstractmethod
    def of_tokens(self, rows: Rows, token: Tensor) -> Self:
        """Return a planner for another sequence, each row of which lies with its token of this one, int64 `[rows]`."""

    @property
    @abstractmethod
    def tokens_by_owner(self) -> Tensor:
        """The tokens behind the rows of each owner, int64 `[P, T]`; -1 is padding."""

    @abstractmethod
    def all_to_all(self, x: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str) -> Tensor:
        """Send the first `sent[0]` rows of x to owner 0, and so on; return `received[0]` rows of owner 0, and so on."""

    def of_heads(self, share: HeadShare) -> Self:
        return replace(self, share=share)

    def all_rows(self, x: Tensor, *, kind: str) -> Tensor:
        """Return the full sequence's `[tokens, ...]` of the local rows' x `[T, ...]`."""
        # Every token has one owner: a sum of zeros and one value is exact in any dtype.
        row, token = (of_real.on(x.device) for of_real in self._real_rows)
        full = x.new_zeros(len(self.global_rows), *x.shape[1:]).index_copy_(0, token, x[row])
        return self.all_reduce_sum(full, kind=kind)

    def prepare_all_rows(self, device: torch.device) -> None:
        """Make what `all_rows` needs on `device`."""
        for of_real in self._real_rows:
            of_real.on(device)

    @cached_property
    def _real_rows(self) -> tuple[DeviceCopies, DeviceCopies]:
        """The local rows that are not padding, and their tokens, int64 `[real rows]`."""
        row = (self.tokens >= 0).nonzero().squeeze(1)
        return DeviceCopies(row), DeviceCopies(self.tokens[row])

"""KV lifetime: each KV head evicts keys; by its routing it gives every key a type, and so the last query that sees it.

All owners of rows learn the types of all tokens, one byte per token and KV head, and so evict the same keys. Routing
learns from what the types did to the output (`kernels/lifetimes/gradient.py`): from every causal pair, those hidden by
the eviction too, so that the forward pass also needs the log-sum-exp of all causal scores.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from farspan.kernels.attention import attention_forward
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.caching import once
from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.lifetimes.gradient import SUMS, straight_through
from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes, chosen_types
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import (
    AttentionPlanner,
    Heads,
    InputSpec,
    KeyRouting,
    RoutedKeys,
    Routing,
    RoutingGradient,
    Sizes,
)
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import take_or
from farspan.kernels.recomputation import kept


class KVLifetime(Masked):
    """Routing has three logits per token and KV head, of the types global, local and sliding.

    The highest wins, the first of equals. `window` tokens after a sliding token see it. `temperature` divides logits in
    the softmax that stands for the choice in the backward pass.
    """

    window: int
    temperature: float

    @property
    def routing_width(self) -> int:
        return 3

    @property
    def accesses(self) -> frozenset[Access]:
        return frozenset({Access.LIFETIMES})

    @abstractmethod
    def penalties(self, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
        """Return what is added to the gradient of the one-hot types to evict keys early, float64 `[tokens, Hk, 3]`."""

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=True)

    def key_routing(self, planner: AttentionPlanner) -> KeyRouting:
        return LifetimeRouting(self, planner)

    def is_dense_up_to(self, longest: int) -> bool:
        # The router may make any key local, which the next global one ends.
        return False

    def unmasked_pairs(self, rows: Rows) -> int:
        """The pairs of a router that has learned nothing."""
        routing = torch.randn(len(rows), 1, self.routing_width, generator=torch.Generator().manual_seed(0))
        return Lifetimes.of(chosen_types(routing), DocumentOrder.of(rows), self.window).pairs(rows)

    def kept_bytes(self, heads: Heads, global_rows: Rows, *, tokens: int, packed: bool) -> int:
        """The four columns of `Lifetimes`, of all tokens."""
        return 4 * torch.int32.itemsize * heads.kv * len(global_rows)

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> Routing:
        return TypeRouting(chosen_types(*routing))


@dataclass(frozen=True, slots=True, eq=False)
class TypeRouting(Routing):
    """The types of all tokens, int8 `[tokens, Hk]`; strategies move keys whatever their types."""

    types: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.types]


class LifetimeRouting(KeyRouting):
    """Evicts keys of one sequence."""

    def __init__(self, mechanism: KVLifetime, planner: AttentionPlanner) -> None:
        self.mechanism, self.planner = mechanism, planner
        self.routing_width = mechanism.routing_width
        self._parts: dict[Tensor, PartTokens] = {}

    @cached_property
    def order(self) -> DocumentOrder:
        return DocumentOrder.of(self.planner.global_rows)

    @cached_property
    def is_padding(self) -> DeviceCopies:
        """Which local rows are padding, bool `[T, 1, 1]`."""
        return DeviceCopies((self.planner.local_rows.document < 0)[:, None, None])

    def part(self, tokens: Tensor) -> "PartTokens":
        """Return the tokens of some rows, int64 `[rows]`: those of a part are the same tensor in every layer."""
        return once(self._parts, tokens, lambda: PartTokens.of(tokens, len(self.planner.global_rows)))

    def all_reduced(self, sizes: Sizes) -> tuple[int, int]:
        """Types forward, sums over pairs backward."""
        numbers = len(self.planner.global_rows) * self.planner.share.local_heads.kv
        return numbers * torch.int8.itemsize, numbers * SUMS * sizes.accumulation_bytes

    def prepare(self, spec: InputSpec) -> "ActiveKeys":
        self.planner.prepare_all_rows(spec.device)
        self.order.to(spec.device)
        self.is_padding.on(spec.device)
        self.part(self.planner.tokens).prepare(spec.device)
        unknown = torch.empty(4, spec.kv_heads, len(self.planner.global_rows), dtype=torch.int32, device="meta")
        return ActiveKeys(of=self, lifetimes=Lifetimes(columns=unknown, window=self.mechanism.window))

    def route(self, q: Tensor, k: Tensor, *routing: Tensor) -> "ActiveKeys":
        def choose() -> Lifetimes:
            types = self.planner.all_rows(chosen_types(*routing), kind="types")  # int8 [tokens, Hk]
            return Lifetimes.of(types, self.order, self.mechanism.window)

        return ActiveKeys(of=self, lifetimes=kept(choose))


@dataclass(frozen=True, slots=True, eq=False)
class PartTokens:
    """The tokens of some rows, -1 for padding. are_all: all of the sequence, in its order."""

    index: DeviceCopies
    at_least_0: DeviceCopies
    has_padding: bool
    are_all: bool

    @staticmethod
    def of(tokens: Tensor, count: int) -> "PartTokens":
        at_least_0 = tokens.clamp(min=0)
        are_all = torch.equal(tokens, torch.arange(count))
        return PartTokens(DeviceCopies(tokens), DeviceCopies(at_least_0), bool((tokens < 0).any()), are_all)

    def prepare(self, device: torch.device) -> None:
        """Copy them to `device`."""
        self.index.on(device)
        self.at_least_0.on(device)

    def take(self, x: Tensor) -> Tensor:
        """Return x `[..., tokens]` of these tokens, -1 for padding."""
        if self.are_all:
            return x
        return take_or(x, self.index.on(x.device), -1) if self.has_padding else x[..., self.index.on(x.device)]


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveKeys(RoutedKeys):
    """The keys that a query sees are those whose lifetime has not ended."""

    of: LifetimeRouting
    lifetimes: Lifetimes

    def narrow(self, plan: Plan, tokens: Tensor) -> Plan:
        return plan.with_lifetimes(self.of.part(tokens).take(self.lifetimes.last))

    def prepare(self, plan: Plan, tokens: Tensor, device: torch.device) -> tuple[Plan, ...]:
        self.of.part(tokens).prepare(device)
        # The gradient is of all causal pairs.
        return plan, self.narrow(plan, tokens)

    def start(self, q: Tensor, *routing: Tensor) -> "TypeGradient":
        # The log-sum-exp [T, Hq] of no key yet.
        causal_lse = torch.full(q.shape[:2], float("-inf"), dtype=accumulation_dtype(q.dtype), device=q.device)
        return TypeGradient(self.of, self.lifetimes, routing[0], causal_lse)

    def resume(self, *saved: Tensor) -> "TypeGradient":
        return TypeGradient(self.of, self.lifetimes, *saved)


class TypeGradient(RoutingGradient):
    """routing: `[T, Hk, 3]` of the local rows. causal_lse: of the causal keys observed so far, `[T, Hq]`."""

    def __init__(self, of: LifetimeRouting, lifetimes: Lifetimes, routing: Tensor, causal_lse: Tensor) -> None:
        self.of, self.lifetimes, self.routing, self.causal_lse = of, lifetimes, routing, causal_lse
        self.sums: Tensor | None = None

    @property
    def saved(self) -> tuple[Tensor, ...]:
        return self.routing, self.causal_lse

    @property
    def backend(self) -> Backend:
        return BACKENDS.get(self.of.planner.backend)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
        # Only the log-sum-exp is of use: there is no cheaper kernel for it.
        part = attention_forward(q, k, v, plan, backend=self.of.planner.backend)[1]
        self.causal_lse = torch.logaddexp(self.causal_lse, part)

    def add(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, plan: Plan, tokens: Tensor) -> None:
        # Backends never meet a plan without visible pairs.
        if plan.is_empty:
            return
        queries, keys = self.of.part(self.of.planner.tokens), self.of.part(tokens)
        of_keys = replace(self.lifetimes, columns=keys.take(self.lifetimes.columns))
        found = self.backend.pair_sums(dout, q, k, v, out, self.causal_lse, plan=plan, lifetimes=of_keys)
        # Sums over the keys of a query belong to the query's token, those over the queries of a key to the key's; those
        # of padding are 0.
        for rows, part in zip((queries, keys), found, strict=True):
            self._sums().index_add_(0, rows.at_least_0.on(part.device), part)

    def gradients(self) -> tuple[Tensor, ...]:
        planner, mechanism = self.of.planner, self.of.mechanism
        sums = planner.all_reduce_sum(self._sums(), kind="types")
        order = self.of.order.to(sums.device)
        gradient = self.backend.type_gradient(sums, self.lifetimes, order)
        # A KV head whose query heads are sharded has this gradient summed over their owners, each with its share of 1.
        group = planner.share.all_heads.query // planner.share.all_heads.kv
        share = min(len(planner.share.head_range), group) / group
        gradient += share * mechanism.penalties(self.lifetimes, order)
        # The ends of documents are global whatever their routing: they learn nothing.
        gradient.masked_fill_(order.of_tokens[2][:, None, None], 0.0)
        # [tokens, Hk, 3] -> [T, Hk, 3]; what padding gets is dropped below.
        index = self.of.part(planner.tokens).at_least_0.on(sums.device)
        local = gradient[index] if len(gradient) else self.routing
        learned = straight_through(local, self.routing, mechanism.temperature)
        # 0 x NaN: the logits of padding may be anything.
        return (learned.masked_fill_(self.of.is_padding.on(sums.device), 0.0),)

    def _sums(self) -> Tensor:
        """The sums over pairs, `[tokens, Hk, SUMS]`; made in the backward pass only."""
        if self.sums is None:
            tokens, kv_heads = len(self.of.planner.global_rows), self.routing.shape[1]
            self.sums = self.routing.new_zeros(tokens, kv_heads, SUMS)
        return self.sums

"""Contenders of the context-parallel benchmark: attention over a sequence that is sharded over ranks."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, Routing, Sizes
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.context_parallel.strategy import Queries, Strategy, Volume
from farspan.parallel.layout import Shards
from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.contenders import NamedContender

SINGLE = "single"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardedCase:
    """Attention over a sharded sequence, whose inputs each rank draws for itself."""

    mechanism: Mechanism
    shards: Shards
    shape: Shape

    def inputs(self, rank: int) -> list[Tensor]:
        """Return normal q, k, v and routing of a rank's rows, 0 for padding; leaves that require gradients."""
        inputs = inputs_of(self.mechanism, self.shards.tokens_local, self.shape, seed=rank)
        with torch.no_grad():
            for x in inputs:
                x[self.shards.index[rank] < 0] = 0
        return inputs

    def gradient_of_out(self, rank: int) -> Tensor:
        """Return a normal gradient of a rank's out, 0 for padding."""
        dout = gradient_of_out(self.shards.tokens_local, self.shape)
        dout[self.shards.index[rank] < 0] = 0
        return dout

    def routing(self) -> Routing:
        """Return the mechanism's routing of the inputs of all ranks."""
        shards = zip(*(self.inputs(rank) for rank in range(self.shards.degree)), strict=True)
        q, k, _, *of_router = (self.shards.unshard(torch.stack(parts).detach()) for parts in shards)
        return self.mechanism.route(self.shards.rows, self.shape.heads, q, k, *of_router)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Attention as it is called on one rank.

    queries: those that the rank attends with. traffic: counts what it sends, while `counting`; None: nothing does.
    volume: the formula of what it sends; None: there is none. scope: entered for every pass.
    """

    attention: Attention
    queries: Queries
    traffic: Traffic | None = None
    volume: Callable[[ShardedCase], Volume] | None = None
    counting: Callable[[], AbstractContextManager[object]] = nullcontext
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


class ContextContender(NamedContender):
    """One way of computing attention over ranks."""

    @abstractmethod
    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        """Return why it cannot compute this, as a sentence, or None if it can."""

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return how many ranks the inner axis of its channel has; 1 if there is none."""
        return 1

    @abstractmethod
    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        """Plan on a rank; all ranks call."""


@final
@dataclass(frozen=True, slots=True)
class StrategyContender(ContextContender):
    """A strategy of farspan, with the fastest backend that can do the work."""

    name: str
    strategy: type[Strategy]
    is_baseline: ClassVar[bool] = False

    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        return self.strategy.unsupported_reason(mechanism, heads, degree, self.width(mechanism, heads, degree))

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return the first that the strategy takes: strategies of two levels want a grid."""
        widths = [width for width in range(1, degree) if degree % width == 0]
        able = (width for width in widths if self.strategy.unsupported_reason(mechanism, heads, degree, width) is None)
        return next(able, 1)

    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        shape, strategy = case.shape, self.strategy(channel)
        request = KernelRequest.of(case.mechanism, shape.dtype, shape.head_dim, shape.value_dim)
        backend = choose_backend("auto", shape.device, request)
        attend = strategy.prepare(case.mechanism, case.shards, shape.heads, backend=backend)
        sizes = Sizes.of(shape.dtype, shape.head_dim, shape.value_dim)

        def volume(of: ShardedCase) -> Volume:
            return attend.volume(sizes, of.routing)

        return Planned(attention=attend, queries=attend.queries, traffic=channel.traffic, volume=volume)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextRow:
    """A row of the tables. threads: of each rank; more than one only where a single rank is compared with several."""

    contender: ContextContender
    case: Case
    layout: str
    degree: int
    threads: int = 1

    @property
    def strategy(self) -> str:
        """The name of the contender; rows of one rank add how many threads it has."""
        return self.contender.name if self.threads == 1 else f"{self.contender.name}_{self.threads}_threads"

    @property
    def setting(self) -> str:
        return f"{self.strategy}, {self.layout}, {self.degree} rank{'s' if self.degree > 1 else ''}"

    @property
    def name(self) -> str:
        return f"{self.case.name} by {self.setting}"

    def shards(self, mechanism: Mechanism, rows: Rows) -> Shards:
        return Shards.deal(rows, layout=self.layout, degree=self.degree, work=mechanism.keys_per_query)

    def sharded(self, tokens: int, shape: Shape) -> ShardedCase:
        """Return the sharded case that is timed."""
        shards = self.shards(self.case.mechanism, self.case.rows(tokens))
        return ShardedCase(mechanism=self.case.mechanism, shards=shards, shape=shape)

"""What is measured: attention over one sequence that is dealt to ranks, as one strategy or rival computes it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.context_parallel.routing import choose_alone
from farspan.parallel.context_parallel.strategy import STRATEGIES, Chosen, Queries, Sizes, Strategy, Volume
from farspan.parallel.layout import Shards
from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of

SINGLE = "single"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """Attention over a sequence that is dealt."""

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

    def chosen(self) -> Chosen:
        """Return what the mechanism chooses of the inputs of all ranks."""
        parts = zip(*(self.inputs(rank) for rank in range(self.shards.degree)), strict=True)
        q, k, _, *routing = (self.shards.unshard(torch.stack(part).detach()) for part in parts)
        return choose_alone(self.mechanism, self.shards.rows, self.shape.heads, q, k, *routing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Attention as it is called on one rank.

    queries: those that the rank attends with. traffic: where what it sends is counted, while `counting`; None: nowhere.
    volume: the formula of what it sends; None: there is none. scope: entered for every pass.
    """

    attention: Attention
    queries: Queries
    traffic: Traffic | None = None
    volume: Callable[[Job], Volume] | None = None
    counting: Callable[[], AbstractContextManager[object]] = nullcontext
    scope: Callable[[], AbstractContextManager[object]] = nullcontext


class Entrant(ABC):
    """One way of computing attention over ranks."""

    name: str
    packed: ClassVar[bool] = True
    """Whether it can compute packed documents."""
    is_rival: ClassVar[bool] = True

    @abstractmethod
    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        """Return why it cannot compute this, as a sentence, or None if it can."""

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return how many ranks the inner axis of its channel has; 1 if there is none."""
        return 1

    @abstractmethod
    def plan(self, job: Job, channel: Channel) -> Planned:
        """Plan on a rank; all ranks call."""


@final
@dataclass(frozen=True, slots=True)
class Under(Entrant):
    """A strategy of farspan, with the fastest backend that can do the work."""

    name: str
    strategy: type[Strategy]
    is_rival: ClassVar[bool] = False

    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        return self.strategy.unsupported_reason(mechanism, heads, degree, self.width(mechanism, heads, degree))

    def width(self, mechanism: Mechanism, heads: Heads, degree: int) -> int:
        """Return the first that the strategy takes: strategies of two levels want a grid."""
        widths = [width for width in range(1, degree) if degree % width == 0]
        able = (width for width in widths if self.strategy.unsupported_reason(mechanism, heads, degree, width) is None)
        return next(able, 1)

    def plan(self, job: Job, channel: Channel) -> Planned:
        shape, strategy = job.shape, self.strategy(channel)
        work = KernelRequest.of(job.mechanism, shape.dtype, shape.head_dim, shape.value_dim)
        backend = choose_backend("auto", shape.device, work)
        attend = strategy.prepare(job.mechanism, job.shards, shape.heads, backend=backend)
        sizes = Sizes.of(shape.dtype, shape.head_dim, shape.value_dim)

        def volume(of: Job) -> Volume:
            return attend.volume(sizes, of.chosen() if strategy.moves_chosen(of.mechanism) else None)

        return Planned(attention=attend, queries=attend.queries, traffic=channel.traffic, volume=volume)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table. threads: of each rank; more than one only where a single rank is compared with several."""

    entrant: Entrant
    case: Case
    layout: str
    degree: int
    threads: int = 1

    @property
    def strategy(self) -> str:
        """The name of what computes it: rows of one rank say how many threads it has."""
        return self.entrant.name if self.threads == 1 else f"{self.entrant.name}_{self.threads}_threads"

    @property
    def name(self) -> str:
        return f"{self.case.name} by {self.strategy}, {self.layout}, {self.degree} rank{'s' if self.degree > 1 else ''}"

    def job(self, tokens: int, shape: Shape) -> Job:
        """Return the job of measuring it."""
        mechanism, rows = self.case.mechanism, self.case.rows(tokens)
        shards = Shards.build(rows, layout=self.layout, degree=self.degree, work=mechanism.keys_per_query)
        return Job(mechanism=mechanism, shards=shards, shape=shape)


def rows_of(
    case: Case, entrants: Sequence[Entrant], layouts: Sequence[str], degrees: Sequence[int], shape: Shape
) -> list[Row]:
    """Return the rows of a mechanism that nobody refuses; first those of one rank.

    On CPUs also of one rank with as many threads as there are ranks in others.
    """
    alone, heads = Under(SINGLE, STRATEGIES.get(SINGLE)), shape.heads
    rows = [
        Row(entrant=alone, case=case, layout="contiguous", degree=1, threads=threads)
        for threads in dict.fromkeys((1, *(degrees if shape.device.type == "cpu" else ())))
    ]
    for degree in degrees:
        for entrant in entrants:
            for layout in layouts:
                if entrant.unsupported_reason(case.mechanism, layout, heads, degree) is None:
                    rows.append(Row(entrant=entrant, case=case, layout=layout, degree=degree))
    return rows

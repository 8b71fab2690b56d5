"""Mechanism: what a query may attend to; one file each in `mechanisms/`.

The base class that a mechanism derives from is the claim of what it needs, and so of where it runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

from torch import Tensor

from farspan.kernels.plan import Plan
from farspan.kernels.registry import Registry
from farspan.kernels.rows import Rows
from farspan.kernels.selection import Selection
from farspan.kernels.visibility import Visibility

Total = Callable[[Tensor], Tensor]
"""Turns a tensor that every holder of rows has computed from its own into the sum over all holders."""


class Mechanism(ABC):
    """A frozen dataclass whose fields are the mechanism's options."""

    routing_width: ClassVar[int] = 0
    """Numbers that a router gives for each token and KV head: a fourth input `[T, Hk, routing_width]`, unless 0."""

    @classmethod
    @abstractmethod
    def examples(cls) -> Sequence[Self]:
        """Return small instances that cover the options; the contract test and the matrix run each of them."""

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        """Return the instances to measure, by the name of their row; if none, the first example is measured."""
        return {}

    @abstractmethod
    def visible_pairs(self, queries: Rows, keys: Rows) -> int:
        """Return how many (query, key) pairs per head are attended to: the work that is useful."""

    def total_bytes(self, everyone: Rows, kv_heads: int, head_dim: int) -> int:
        """Return the bytes of what is summed over all holders of rows to choose by: nothing, unless it is routed."""
        return 0


class Masked(Mechanism):
    """Visibility is static: known from the rows alone."""

    @abstractmethod
    def visibility(self) -> Visibility:
        """Return which rows see which."""

    def visible_pairs(self, queries: Rows, keys: Rows) -> int:
        visibility = self.visibility()
        heads = len(visibility.window) if isinstance(visibility.window, tuple) else 1
        return Plan.build(queries, keys, visibility, heads=heads).visible_pairs


class Routed(Masked):
    """Of the keys that visibility shows, each query attends to blocks that are chosen by content.

    Rows may be spread over several holders, in any order. Each calls `select` with the rows that it holds; `everyone`
    is the whole sequence, known to all, and `total` sums over the holders: however rows are spread, all choose alike.
    """

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, held: Rows, everyone: Rows, total: Total) -> Selection:
        """Choose blocks for the queries q `[T, Hq, D]` among all keys, of which k `[T, Hk, D]` are held here.

        Nothing of the choice is differentiable: gradients flow through the chosen blocks.
        """

    @abstractmethod
    def total_bytes(self, everyone: Rows, kv_heads: int, head_dim: int) -> int:
        """Return the bytes of the tensors that `select` has summed over holders."""


def alone(x: Tensor) -> Tensor:
    """The total over a single holder."""
    return x


def choose(mechanism: Masked, plan: Plan, q: Tensor, k: Tensor) -> Plan:
    """Return the plan of a whole sequence, all rows held here in one order, with what a routed mechanism chooses."""
    if not isinstance(mechanism, Routed):
        return plan
    return plan.choosing(mechanism.select(q, k, plan.queries, plan.queries, alone))


MECHANISMS: Registry[type[Mechanism]] = Registry("attention mechanism", "farspan.kernels.mechanisms")

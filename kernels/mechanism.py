"""Mechanism: what a query may attend to; one file each in `mechanisms/`.

The base class that a mechanism derives from is the claim of what it needs, and so of where it runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from farspan.kernels.plan import Plan
from farspan.kernels.registry import Registry
from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility


class Mechanism(ABC):
    """A frozen dataclass whose fields are the mechanism's options."""

    @classmethod
    @abstractmethod
    def examples(cls) -> Sequence[Self]:
        """Return small instances that cover the options; the contract test and the matrix run each of them."""

    @abstractmethod
    def visible_pairs(self, queries: Rows, keys: Rows) -> int:
        """Return how many (query, key) pairs per head are attended to: the work that is useful."""


class Masked(Mechanism):
    """Visibility is static: known from the rows alone."""

    @abstractmethod
    def visibility(self) -> Visibility:
        """Return which rows see which."""

    def visible_pairs(self, queries: Rows, keys: Rows) -> int:
        return Plan.build(queries, keys, self.visibility()).visible_pairs


MECHANISMS: Registry[type[Mechanism]] = Registry("attention mechanism", "farspan.kernels.mechanisms")

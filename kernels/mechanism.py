"""Mechanism: what a query may attend to, one file each in `mechanisms/`; its base class, one of `kinds/`, is its kind.

A kind answers all that strategies, backends, the cost model and the benchmarks ask of a mechanism; none of them knows
the kinds that there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import ClassVar, Self

from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planner import AttentionPlanner, Heads, Routing, SequenceAttention, Sizes
from farspan.registry import Registry

SAMPLED = 1 << 11
"""Queries of a long sequence whose choice is drawn, where an estimate will do."""


class Access(Enum):
    """A way in which queries get at other tokens; strategies serve some of them, backends compute some of them."""

    MASK = "keys that a mask shows, known from positions alone"
    BLOCKS = "blocks of keys that queries select"
    LIFETIMES = "keys that are evicted, each after a last query"
    STATE = "the state of a recurrence"


class Mechanism(ABC):
    """A frozen dataclass whose fields are the mechanism's options."""

    # The model asks: what a router has to give.

    routing_reads_detached: ClassVar[bool] = False
    """Whether the router learns alone: its gradient stops at what it reads, the layer's input."""

    @property
    def routing_width(self) -> int:
        """Numbers that a router gives for each token and KV head: a fourth input `[T, Hk, routing_width]`, unless 0."""
        return 0

    @property
    def heads_differ(self) -> bool:
        """Whether the number of a query head matters for what it attends to, or how."""
        return False

    # Strategies and backends ask: whether they can run it.

    @property
    @abstractmethod
    def accesses(self) -> frozenset[Access]:
        """What its attention is made of: the claim that decides which strategies and backends can run it."""

    @property
    def static_mask(self) -> AttentionMask | None:
        """The mask that says all about what queries see; None where there is more to it."""
        return None

    @property
    def is_windowed(self) -> bool:
        """Whether, by positions alone, a query sees less than its document or all of it up to itself."""
        return False

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later token, as a language model needs; choices may depend on later ones."""
        return True

    @property
    def adds_gradient(self) -> bool:
        """Whether backward adds a gradient that is none of the loss: it keeps its size when the loss is scaled."""
        return False

    # Tests, benchmarks and configurations ask: which instances there are.

    @classmethod
    @abstractmethod
    def examples(cls) -> Sequence[Self]:
        """Return small instances that cover the options; the contract test and the matrix run each of them."""

    def in_layer(self, layer: int, layers: int) -> Self:
        """Return the mechanism as layer number `layer` of `layers` has it; the same in all, unless it depends on it."""
        return self

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        """Return the instances to measure, by the name of their row; if none, the first example is measured."""
        return {}

    # A strategy asks: how it runs.

    @abstractmethod
    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        """Plan attention of the local rows and heads of one sequence.

        Raises ValueError when the mechanism's options are for another number of heads.
        """

    # The cost model, the layouts and the estimates ask: how much work, memory and traffic it is.

    def unmasked_pairs(self, rows: Rows) -> int:
        """Return how many (query, key) pairs of a full sequence are attended to, per head: the work that is useful."""
        return int(self.keys_per_query(rows).sum())

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        """Return the work of each token of a full sequence, to shard it by: float64 `[tokens]`, 0 for padding.

        Here the same for all; for mechanisms with a mask, the keys that its query sees or, by content, may see.
        """
        return (global_rows.document >= 0).double()

    def useful_flops(self, rows: Rows, head_dim: int, value_dim: int) -> int:
        """Return the FLOPs per head that the forward pass needs: scores and weighted sums of unmasked pairs.

        An estimate where queries choose by content: a run counts those of every batch.
        """
        return 2 * (head_dim + value_dim) * self.unmasked_pairs(rows)

    def saved_bytes(self, heads: Heads, sizes: Sizes, global_rows: Rows) -> int:
        """Return the bytes per token of the sequence that a forward pass saves: q, k, v, out and a log-sum-exp."""
        rows = (heads.query + heads.kv) * sizes.kv_width * sizes.element_bytes
        return rows + heads.query * sizes.accumulation_bytes

    def kept_bytes(self, heads: Heads, global_rows: Rows, *, tokens: int, packed: bool) -> int:
        """Return the bytes that a layer keeps of what it chose by content until its backward pass, recomputed or not.

        tokens: of the sequence, as many as are local. packed: whether the backend takes selections as bits; see
        `Backend`. Here nothing: a choice of few tokens does not count.
        """
        return 0

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> Routing:
        """Return the selection in a full sequence that one process has, by its inputs."""
        return Routing()

    def sample_routing(self, global_rows: Rows, heads: Heads, *, max_queries: int | None = None) -> Routing:
        """Return the selection in a full sequence for normal inputs, the same at every call.

        max_queries: if there are more, as many of them, evenly spaced, may stand for all.
        """
        return Routing()

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        """Return why it cannot attend with these heads to documents of up to `longest` tokens; None if it can."""
        return None

    def is_dense_up_to(self, longest: int) -> bool:
        """Return whether its options hide no key of documents of up to `longest` tokens, unlike what its name says."""
        return False


MECHANISMS: Registry[type[Mechanism]] = Registry("attention mechanism", "farspan.kernels.mechanisms")

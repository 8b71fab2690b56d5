"""Mechanism: what a query may attend to; one file each in `mechanisms/`.

The base class that a mechanism derives from is the claim of what it needs, and so of where it runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from farspan.kernels.lifetimes.gradient import SUMS
from farspan.kernels.lifetimes.lifetimes import Lifetimes, chosen_types
from farspan.kernels.masks.attention_mask import AttentionMask, count_keys_per_query
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockExtent, BlockPartition, BlockSelection
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from farspan.kernels.routing.token_choice import ChosenTokens
from farspan.registry import Registry

AllReduceSum = Callable[[Tensor], Tensor]
"""Turns a tensor that every holder of rows has computed from its own into the sum over all holders."""


def identity(x: Tensor) -> Tensor:
    """The total over a single holder."""
    return x


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Numbers of query heads and of key/value heads; `query % kv == 0`."""

    query: int
    kv: int


class Mechanism(ABC):
    """A frozen dataclass whose fields are the mechanism's options."""

    routing_width: ClassVar[int] = 0
    """Numbers that a router gives for each token and KV head: a fourth input `[T, Hk, routing_width]`, unless 0."""
    routing_reads_detached: ClassVar[bool] = False
    """Whether the router learns alone: its gradient stops at what it reads, the layer's input."""

    @property
    def heads_differ(self) -> bool:
        """Whether what a query head attends to, or how, depends on its number."""
        return False

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

    @abstractmethod
    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        """Return how many (query, key) pairs per head are attended to: the work that is useful."""

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        """Return the work of each token of a whole sequence, to deal it by: float64 `[tokens]`, 0 for padding.

        Here the same for all; of mechanisms with a mask, the keys that its query sees or, by content, may see.
        """
        return (global_rows.document >= 0).double()

    def useful_flops(self, queries: Rows, keys: Rows, head_dim: int, value_dim: int) -> int:
        """Return the FLOPs per head that the forward pass needs: scores and weighted sums of visible pairs."""
        return 2 * (head_dim + value_dim) * self.unmasked_pairs(queries, keys)

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        """Return the bytes of what is summed over all holders of rows to choose by: nothing, unless it is routed."""
        return 0

    def gradient_all_reduce_bytes(self, global_rows: Rows, heads: Heads, accumulation_bytes: int) -> int:
        """Return the bytes of what is summed over all holders of rows in the backward pass."""
        return 0

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        """Return why it cannot attend with these heads to documents of up to `longest` tokens; None if it can."""
        return None


class Recurrent(Mechanism):
    """Each head sums k v^T of the tokens so far, which fade at a fixed rate; a query reads the sum, without softmax."""

    @property
    def heads_differ(self) -> bool:
        return True

    @abstractmethod
    def decay(self, num_heads: int) -> Tensor:
        """Return the rates s >= 0, float64 `[num_heads]`, of all query heads: a token n back weighs exp(-s n)."""

    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        """Return the queries: each reads one sum that stands for all keys."""
        return int((queries.document >= 0).sum())

    def useful_flops(self, queries: Rows, keys: Rows, head_dim: int, value_dim: int) -> int:
        tokens = int((queries.document >= 0).sum())
        return 4 * tokens * head_dim * value_dim


class Masked(Mechanism):
    """Visibility is static: known from the rows alone."""

    @property
    def heads_differ(self) -> bool:
        return isinstance(self.attention_mask().window, tuple)

    @abstractmethod
    def attention_mask(self) -> AttentionMask:
        """Return which rows see which."""

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        return count_keys_per_query(self.attention_mask(), global_rows)

    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        attention_mask = self.attention_mask()
        heads = len(attention_mask.window) if isinstance(attention_mask.window, tuple) else 1
        return Plan.build(queries, keys, attention_mask, heads=heads).unmasked_pairs

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        try:
            self.attention_mask().by_heads(heads.query)
        except ValueError as error:
            return str(error)
        return None


class Routed(Masked):
    """Of the keys that visibility shows, queries attend to blocks that are chosen, by content or by a pattern.

    Rows may be spread over several holders, in any order. Each calls `select` with the rows that it holds; what the
    choice is made from is summed over the holders: however rows are spread, all choose alike.
    """

    @abstractmethod
    def blocks(self, global_rows: Rows) -> BlockPartition:
        """Return the blocks of keys of a whole sequence."""

    def tiles(self, global_rows: Rows) -> BlockPartition | None:
        """Return the tiles of queries that choose together, or None where every query chooses for itself."""
        return None

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, local_shard: "LocalShard") -> BlockSelection:
        """Choose blocks for the held queries q `[T, Hq, D]` among all keys, of which k `[T, Hk, D]` are held.

        Nothing of the choice is differentiable: gradients flow through the chosen blocks.
        """

    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        """What would be chosen for random queries and keys."""
        generator, one = torch.Generator().manual_seed(0), Heads(query=1, kv=1)
        q, k = (torch.randn(len(rows), 1, 16, generator=generator) for rows in (queries, keys))
        local_shard = LocalShard(
            mechanism=self, rows=queries, global_rows=keys, heads=range(1), all_heads=one, total=identity
        )
        plan = Plan.build(queries, keys, self.attention_mask(), heads=1, selection=self.select(q, k, local_shard))
        return count_pairs(plan, kv_heads=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalShard:
    """What is held here of a sequence whose rows and heads may be spread over several holders.

    rows: of the tensors held here, in their order. everyone: the whole sequence, known to all. heads: which of all
    query heads the tensors have. total: sums over the holders of the other rows of these heads.
    """

    mechanism: Routed
    rows: Rows
    global_rows: Rows
    heads: range
    all_heads: Heads
    total: AllReduceSum

    @cached_property
    def blocks(self) -> BlockPartition:
        """The blocks of keys of the whole sequence."""
        return self.mechanism.blocks(self.global_rows)

    @cached_property
    def tiles(self) -> BlockPartition:
        """The tiles of queries of the whole sequence; every position is one where every query chooses for itself."""
        tiles = self.mechanism.tiles(self.global_rows)
        return BlockPartition.blocks(self.global_rows, 1) if tiles is None else tiles

    @cached_property
    def block(self) -> Tensor:
        """The block of each held row, int64 `[rows]`; -1 for padding."""
        return self.blocks.of(self.rows)

    @cached_property
    def held_tiles(self) -> tuple[Tensor, Tensor]:
        """The tiles that have rows here, ascending, int64 `[units]`; and of each row its place among them, or -1."""
        tile = self.tiles.of(self.rows)
        held, place = torch.cat((tile.new_full((1,), -1), tile)).unique(return_inverse=True)
        return held[1:], place[1:] - 1

    @cached_property
    def tile_extent(self) -> BlockExtent:
        """Where the tiles of queries lie in their documents."""
        return BlockExtent.of(self.tiles, self.global_rows)

    @cached_property
    def block_extent(self) -> BlockExtent:
        """Where the blocks of keys lie in their documents."""
        return BlockExtent.of(self.blocks, self.global_rows)

    @property
    def kv_heads(self) -> range:
        """The KV heads of the held query heads."""
        group = self.all_heads.query // self.all_heads.kv
        return range(self.heads.start // group, (self.heads.stop - 1) // group + 1)

    def key_means(self, k: Tensor) -> Tensor:
        """Return the mean of the keys of each block of the sequence, float32 `[blocks, Hk, D]`."""
        return self._means(k, self.blocks)

    def query_means(self, q: Tensor) -> Tensor:
        """Return the mean of the queries of each tile that has rows here, float32 `[units, Hq, D]`."""
        return self._means(q, self.tiles)[self.held_tiles[0].to(q.device)]

    def _means(self, x: Tensor, partition: BlockPartition) -> Tensor:
        counts = partition.sizes.to(x.device)
        return (self.total(partition.sums(x, self.rows)) / counts.view(-1, *[1] * (x.dim() - 1))).float()


class TokenChoice(Mechanism):
    """Each KV head chooses tokens of the whole sequence by their routing; only these attend, to each other.

    A head's output at its tokens is multiplied by the sigmoid of their routing, which is how the router learns; it is 0
    at all other tokens.
    """

    routing_width = 1

    @abstractmethod
    def among(self) -> Masked:
        """Return how the chosen tokens of one document see each other; their positions count the chosen from 0."""

    @abstractmethod
    def choose(self, logits: Tensor, global_rows: Rows) -> Tensor:
        """Return whether each KV head takes each token, bool `[tokens, Hk]`, by float32 logits `[tokens, Hk]`.

        Both are of the whole sequence, in its order. Padding is never taken.
        """

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        return len(global_rows) * heads.kv * torch.float32.itemsize

    def typical(self, global_rows: Rows) -> Rows:
        """Return the rows that one KV head takes of a sequence if its router knows nothing."""
        logits = torch.randn(len(global_rows), 1, generator=torch.Generator().manual_seed(0))
        return ChosenTokens.of(self.choose(logits, global_rows), global_rows).rows

    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        """What would be chosen if the router knew nothing."""
        chosen = self.typical(queries)
        return self.among().unmasked_pairs(chosen, chosen)


class KVLifetime(Masked):
    """Each KV head gives every key a type by its routing, and with it a lifetime: the last query that sees it.

    Routing has three logits per token and KV head, of the types global, local and sliding; the highest wins, the first
    of equals. `temperature` divides them in the softmax that stands for the choice in the backward pass.
    """

    routing_width = 3
    temperature: float

    @abstractmethod
    def lifetimes(self, types: Tensor, global_rows: Rows) -> Lifetimes:
        """Return the lifetimes of a whole sequence by the types of its tokens, int8 `[tokens, Hk]`."""

    @abstractmethod
    def penalties(self, lifetimes: Lifetimes, global_rows: Rows) -> Tensor:
        """Return what is added to the gradient of the one-hot types so that keys die, float64 `[tokens, Hk, 3]`."""

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=True)

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        return len(global_rows) * heads.kv * torch.int8.itemsize

    def gradient_all_reduce_bytes(self, global_rows: Rows, heads: Heads, accumulation_bytes: int) -> int:
        return len(global_rows) * heads.kv * SUMS * accumulation_bytes

    def unmasked_pairs(self, queries: Rows, keys: Rows) -> int:
        """What a router that knows nothing would choose."""
        routing = torch.randn(len(keys), 1, self.routing_width, generator=torch.Generator().manual_seed(0))
        return self.lifetimes(chosen_types(routing), keys).pairs(queries, keys)


MECHANISMS: Registry[type[Mechanism]] = Registry("attention mechanism", "farspan.kernels.mechanisms")

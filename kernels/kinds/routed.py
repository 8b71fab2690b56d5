"""Routed: queries attend to blocks of keys that they select, by content or by a pattern, among those of a mask."""

from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.caching import Made, once
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import count_keys_per_query
from farspan.kernels.masks.packed_selection import PackedSelection, list_bytes
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import SAMPLED, Access
from farspan.kernels.planner import (
    AllReduceSum,
    AttentionPlanner,
    Heads,
    HeadShare,
    InputSpec,
    KeyRouting,
    RoutedKeys,
    Routing,
    Sizes,
)
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from farspan.kernels.recomputation import kept

SAMPLE_HEAD_DIM = 16
"""Of the normal queries and keys that stand for real ones: blocks win by chance, whatever the width."""


class Routed(Masked):
    """Rows may be sharded over several owners, in any order. Each calls `select` with the rows that it has.

    Scores are made of sums over the owners, so that all select the same however rows are sharded.
    """

    @property
    def accesses(self) -> frozenset[Access]:
        return frozenset({Access.BLOCKS})

    @abstractmethod
    def key_blocks(self, global_rows: Rows) -> BlockPartition:
        """Return the blocks of keys of a full sequence."""

    def query_blocks(self, global_rows: Rows) -> BlockPartition:
        """Return the blocks of queries that select together; here every query selects for itself."""
        return BlockPartition.blocks(global_rows, 1)

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, local_shard: "LocalShard") -> BlockSelection:
        """Select blocks for the local queries q `[T, Hq, D]` among all keys, of which k `[T, Hk, D]` are local.

        The selection is not differentiable: gradients flow through the selected blocks.
        """

    def select_packed(self, q: Tensor, k: Tensor, local_shard: "LocalShard") -> PackedSelection:
        """Select the same as `select` on the device of q; here by waiting for it, which mechanisms should avoid."""
        return PackedSelection.pack(self.select(q, k, local_shard), q.device)

    def prepare(self, local_shard: "LocalShard", device: torch.device) -> PackedSelection | None:
        """Make what `select_packed` needs on `device`, ahead of it; return what it will, with bits of the meta device.

        Here None: a selection that waits is known when it is made.
        """
        return None

    def all_reduce_bytes(self, global_rows: Rows, heads: Heads, head_dim: int) -> int:
        """Return the bytes of the tensors that `select` sums over all owners of rows; none for a pattern."""
        return 0

    def most_selected(self, blocks: int) -> int:
        """Return the most key blocks that a query selects, of the `blocks` of its document."""
        return blocks

    def selects_all_of(self, blocks: int) -> bool:
        """Return whether every query of a document of so many key blocks selects all that it sees, whatever its q."""
        return blocks <= 1

    def is_dense_up_to(self, longest: int) -> bool:
        blocks = self.key_blocks(Rows.packed([longest])).count
        return self.selects_all_of(blocks) and super().is_dense_up_to(longest)

    def key_routing(self, planner: AttentionPlanner) -> KeyRouting:
        if planner.key_rows is not planner.local_rows and int(self.query_blocks(planner.global_rows).sizes.max()) > 1:
            raise ConfigError(
                f"{self} cannot attend with the last tokens alone, as queries of a tile select together: compute all "
                "tokens each time, without a KV cache."
            )
        return LocalShard(
            mechanism=self,
            rows=planner.local_rows,
            key_rows=planner.key_rows,
            global_rows=planner.global_rows,
            share=planner.share,
            backend=planner.backend,
            all_reduce_sum=lambda x: planner.all_reduce_sum(x, kind="choice"),
        )

    def unmasked_pairs(self, rows: Rows, *, max_queries: int | None = None) -> int:
        """The pairs of the selection for normal queries and keys; max_queries: as for `sample_routing`."""
        attention_mask = self.attention_mask()
        selection = self.sample_routing(rows, Heads(query=1, kv=1), max_queries=max_queries).selection
        pairs = count_pairs(Plan.build(rows, rows, attention_mask, heads=1, selection=selection), kv_heads=1)
        # Queries of a sample stand for others by the keys that they may select from.
        visible = count_keys_per_query(attention_mask, rows)
        return round(pairs * float(visible.sum() / visible[selection.query_block >= 0].sum().clamp(min=1)))

    def useful_flops(self, rows: Rows, head_dim: int, value_dim: int) -> int:
        return 2 * (head_dim + value_dim) * self.unmasked_pairs(rows, max_queries=SAMPLED)

    def kept_bytes(self, heads: Heads, global_rows: Rows, *, tokens: int, packed: bool) -> int:
        """The lists of the query blocks of these tokens, as bits or numbers or, for a random choice, as on a CPU."""
        blocks, query_blocks = self.key_blocks(global_rows), int((self.query_blocks(global_rows).sizes > 0).sum())
        lists = heads.query * -(-tokens * query_blocks // max(int((global_rows.document >= 0).sum()), 1))
        if packed:
            return lists * list_bytes(blocks.count, self.most_selected(int(blocks.first.diff().max())))
        sample = self.sample_routing(global_rows, Heads(query=1, kv=1), max_queries=SAMPLED).selection
        numbers = lists * len(sample.key_blocks) // max(sample.num_query_blocks, 1)
        return lists * torch.int64.itemsize + numbers * torch.int32.itemsize  # offsets, and the blocks

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> "SelectedBlocks":
        # On a GPU as it is trained with: the checks there compare it with the CPU's.
        select = self.select_packed if q.device.type == "cuda" else self.select
        return SelectedBlocks(select(q, k, self._unsharded(global_rows, global_rows, heads, one_in=1)).as_lists)

    def sample_routing(self, global_rows: Rows, heads: Heads, *, max_queries: int | None = None) -> "SelectedBlocks":
        generator, tokens = torch.Generator().manual_seed(0), len(global_rows)
        # Few queries select among all blocks: long sequences would take as long as the attention itself.
        one_in = max(-(-tokens // max_queries), 1) if max_queries else 1
        index = torch.arange(0, tokens, one_in)
        q, k = (torch.randn(len(index), n, SAMPLE_HEAD_DIM, generator=generator) for n in (heads.query, heads.kv))
        selection = self.select(q, k, self._unsharded(global_rows.take(index), global_rows, heads, one_in))
        # The sampled queries are rows 0, 1, ... of the selection; the others have no query block.
        nth = torch.full((tokens,), -1)
        nth[index] = torch.arange(len(index))
        return SelectedBlocks(selection.of_queries(nth), one_in)

    def _unsharded(self, rows: Rows, global_rows: Rows, heads: Heads, one_in: int) -> "LocalShard":
        """Return these rows, with all heads, as those of a single owner; one_in: so many rows each stands for."""
        return LocalShard(
            mechanism=self,
            rows=rows,
            key_rows=rows,
            global_rows=global_rows,
            share=HeadShare.all(heads),
            backend="reference",
            # Integers are counts and weights of (query, block) pairs.
            all_reduce_sum=lambda x: x if x.is_floating_point() else x * one_in,
        )


@dataclass(frozen=True, slots=True, eq=False)
class SelectedBlocks(Routing):
    """one_in: one query of this many has selected and stands for all; others have no query block."""

    selection: BlockSelection
    one_in: int = 1

    def tensors(self) -> list[Tensor]:
        return [self.selection.offsets, self.selection.key_blocks]


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalShard(KeyRouting):
    """The local rows and heads of a sequence that may be sharded over several owners.

    rows, key_rows: of the local queries and keys, in their order. global_rows: the full sequence, known to all.
    share: the heads of the local tensors. all_reduce_sum: over the owners of the other rows of these heads.
    """

    selects_blocks = True

    mechanism: Routed
    rows: Rows
    key_rows: Rows
    global_rows: Rows
    share: HeadShare
    backend: str
    all_reduce_sum: AllReduceSum
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @cached_property
    def key_blocks(self) -> BlockPartition:
        return self.mechanism.key_blocks(self.global_rows)

    @cached_property
    def query_blocks(self) -> BlockPartition:
        return self.mechanism.query_blocks(self.global_rows)

    @cached_property
    def key_block_of_row(self) -> Tensor:
        """The key block of each local query, int64 `[rows]`; -1 for padding."""
        return self.key_blocks.of(self.rows)

    @cached_property
    def local_query_blocks(self) -> tuple[Tensor, Tensor]:
        """The query blocks with local rows, ascending, int64 `[blocks]`; and where each row's is among them, or -1."""
        # A -1 in front makes sure that padding is the first of the unique blocks, to be dropped.
        block = self.query_blocks.of(self.rows)
        local, nth = torch.cat((block.new_full((1,), -1), block)).unique(return_inverse=True)
        return local[1:], nth[1:] - 1

    @cached_property
    def query_block_extent(self) -> tuple[Tensor, Tensor]:
        return self.query_blocks.extent(self.global_rows)

    @cached_property
    def key_block_extent(self) -> tuple[Tensor, Tensor]:
        return self.key_blocks.extent(self.global_rows)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what a mechanism makes of the rows alone, made once for all layers."""
        return once(self._made, key, make)

    def key_means(self, k: Tensor) -> Tensor:
        """Return the mean of the keys of each key block of the sequence, float32 `[blocks, Hk, D]`."""
        return self._means(k, self.key_blocks, self.key_rows)

    def query_means(self, q: Tensor) -> Tensor:
        """Return the mean of the queries of each query block with local rows, float32 `[blocks, Hq, D]`."""
        # All owners sum the means of all query blocks; each needs those of its own rows.
        return self._means(q, self.query_blocks, self.rows)[self.local_query_blocks[0].to(q.device)]

    def _means(self, x: Tensor, partition: BlockPartition, rows: Rows) -> Tensor:
        # Sums are float64, so that the mean rounds to the same float32 however the rows are sharded.
        counts = partition.sizes.to(x.device).view(-1, *[1] * (x.dim() - 1))  # [blocks] -> [blocks, 1, 1]
        return (self.all_reduce_sum(partition.sums(x, rows)) / counts).float()

    def all_reduced(self, sizes: Sizes) -> tuple[int, int]:
        # Nothing is summed backward: the selection has no gradient.
        return self.mechanism.all_reduce_bytes(self.global_rows, self.share.local_heads, sizes.head_dim), 0

    def prepare(self, spec: InputSpec) -> RoutedKeys | None:
        if not BACKENDS.get(self.backend).packs_selections:
            return None
        selection = self.mechanism.prepare(self, spec.device)
        return None if selection is None else RoutedKeys(selection=selection)

    def route(self, q: Tensor, k: Tensor, *routing: Tensor) -> RoutedKeys:
        packed = BACKENDS.get(self.backend).packs_selections
        select = self.mechanism.select_packed if packed else self.mechanism.select
        with torch.cuda.device_of(q):
            return RoutedKeys(selection=kept(lambda: select(q, k, self)))

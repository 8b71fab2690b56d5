"""Plan: the (query, key) pairs that attention of some rows to others has to compute, made before any tensor exists.

Example: a causal document of 100 tokens, two query heads, the second with a window of 70.
Plan.build(rows, rows, AttentionMask(window=(100, 70)), heads=2).parts are

    HeadPlan(heads=(0,))    CAUSAL queries [0, 100) x keys [0, 100)
    HeadPlan(heads=(1,))    CAUSAL [0, 64) x [0, 64), FULL [64, 69) x [0, 30), ANTICAUSAL [69, 99) x [0, 30), ...

Regions cover the static mask. A selection or lifetimes, known only once a layer has its queries, are put on top by
`with_selection` and `with_lifetimes`: regions are cut once, however many layers share them.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.isolation import Isolation
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.regions import Kind, Region, cut_regions


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The query heads that share one uniform mask, and the disjoint regions that hold its visible pairs."""

    heads: tuple[int, ...]
    attention_mask: AttentionMask
    regions: tuple[Region, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The pairs visible under `attention_mask` and, where there is one, in the key blocks of `selection`.

    lifetime: int32 `[Hk, keys]` or None, the last query position that sees each key of each KV head, on the device that
    attends; -1: none does, as for padding.
    isolation: None if it needs none.
    Raises ValueError for lifetimes with any mask but the plain causal one, or with a selection.
    """

    queries: Rows
    keys: Rows
    attention_mask: AttentionMask
    heads: int
    parts: tuple[HeadPlan, ...]
    selection: BlockSelection | PackedSelection | None
    isolation: Isolation | None
    lifetime: Tensor | None = None
    drawn_from: "tuple[Plan, Tensor] | None" = None
    """Where content decides which queries there are: a plan, and the index of each among its queries; see `draw`."""
    shared: dict[Hashable, Any] = field(default_factory=dict)
    """What backends compute from rows and mask alone, under keys of their own; narrowed plans share it."""
    cache: dict[Hashable, Any] = field(default_factory=dict, init=False)
    """What backends compute from the plan with its selection or lifetimes: shared by forward and backward."""

    def __post_init__(self) -> None:
        if self.lifetime is not None and (
            self.selection is not None or self.attention_mask != AttentionMask(causal=True)
        ):
            raise ValueError(
                "a plan with lifetimes must be causal, with no window, no neighborhood and no selection besides"
            )

    @staticmethod
    def build(
        queries: Rows,
        keys: Rows,
        attention_mask: AttentionMask,
        *,
        heads: int,
        selection: BlockSelection | PackedSelection | None = None,
        shortest_run: int = 32,
    ) -> "Plan":
        """Plan attention of `heads` query heads; runs shorter than `shortest_run` rows are tiled instead.

        Raises ValueError when windows or selection are for another number of heads or queries.
        """
        parts = tuple(
            HeadPlan(tuple(group), uniform, cut_regions(queries, keys, uniform, shortest_run))
            for uniform, group in attention_mask.by_heads(heads).items()
        )
        plan = Plan(
            queries=queries,
            keys=keys,
            attention_mask=attention_mask,
            heads=heads,
            parts=parts,
            selection=None,
            isolation=Isolation.of(queries, keys, causal=attention_mask.causal),
        )
        return plan if selection is None else plan.with_selection(selection)

    def with_selection(self, selection: BlockSelection | PackedSelection) -> "Plan":
        """The same plan, restricted to the key blocks that each query selects; its cache starts empty."""
        if self.heads % selection.heads or len(selection.query_block) != len(self.queries):
            raise ValueError(
                f"a selection for {selection.heads} heads and {len(selection.query_block)} queries cannot go with a "
                f"plan for {self.heads} heads and {len(self.queries)} queries"
            )
        return replace(self, selection=selection)

    def emptied(self) -> "Plan":
        """The plan of the same rows, none of which see each other."""
        return replace(self, parts=tuple(replace(part, regions=()) for part in self.parts))

    def draw(self, index: Tensor, selection: BlockSelection) -> "Plan":
        """The plan of the queries at `index` of this plan, in any order, and of the key blocks that each selects.

        index: int64 `[queries]` on the device that attends, as are the lists of the selection, in which each query is
        a query block: the host knows only how many there are.
        """
        queries = self.queries_on(index.device)
        # Which pairs are visible, the host does not know.
        regions = (Region(Kind.MASKED, 0, len(index), 0, len(self.keys)),) if len(index) else ()
        return replace(
            self,
            queries=Rows(position=queries.position[index], document=queries.document[index]),
            parts=tuple(replace(part, regions=regions) for part in self.parts),
            selection=selection,
            isolation=None if self.isolation is None else self.isolation.of_queries(index),
            drawn_from=(self, index),
            shared={},
        )

    def queries_on(self, device: torch.device) -> Rows:
        """Return the queries on `device`, where they are copied once."""
        return once(self.shared, ("queries", device), lambda: self.queries.to(device))

    def keys_on(self, device: torch.device) -> Rows:
        """Return the keys on `device`, where they are copied once."""
        return once(self.shared, ("keys", device), lambda: self.keys.to(device))

    def with_lifetimes(self, lifetime: Tensor) -> "Plan":
        """The same plan, restricted to keys that are still active at the query's position; its cache starts empty."""
        if lifetime.dtype != torch.int32 or lifetime.dim() != 2 or lifetime.shape[1] != len(self.keys):
            raise ValueError(
                f"lifetimes must be int32 [KV heads, {len(self.keys)}], not {lifetime.dtype} {list(lifetime.shape)}"
            )
        return replace(self, lifetime=lifetime)

    @property
    def is_empty(self) -> bool:
        """Whether the mask alone hides every key from every query."""
        return not any(part.regions for part in self.parts)

    @cached_property
    def unmasked_pairs(self) -> int:
        """The number of (query, key) pairs visible under the mask alone, the mean over heads."""
        pairs = sum(
            self._pairs(part.attention_mask, region) * len(part.heads) for part in self.parts for region in part.regions
        )
        return pairs // self.heads

    def _pairs(self, attention_mask: AttentionMask, region: Region) -> int:
        num_queries = region.query_stop - region.query_start
        num_keys = region.key_stop - region.key_start
        if region.kind is Kind.FULL:
            return num_queries * num_keys
        if region.kind is Kind.CAUSAL:
            # Query i sees keys 0..i; queries from num_keys on see all of them.
            side = min(num_queries, num_keys)
            return side * (side + 1) // 2 + (num_queries - side) * num_keys
        if region.kind is Kind.ANTICAUSAL:
            return num_queries * (num_queries + 1) // 2
        return int(self.region_mask(attention_mask, region).sum())

    def region_mask(self, attention_mask: AttentionMask, region: Region) -> Tensor:
        """The pairs of the region that are visible, bool `[region's queries, region's keys]`."""
        return attention_mask.mask(self.queries.slice(region.queries), self.keys.slice(region.keys))

    def mask(self) -> Tensor:
        """The dense mask of the plan, bool `[heads, queries, keys]`; quadratic, for references."""
        visible = torch.empty(self.heads, len(self.queries), len(self.keys), dtype=torch.bool)
        for part in self.parts:
            visible[list(part.heads)] = part.attention_mask.mask(self.queries, self.keys)
        if self.selection is not None:
            # [head groups, queries, keys] -> [heads, queries, keys]
            visible &= self.selection.mask(self.keys).repeat_interleave(self.heads // self.selection.heads, dim=0)
        if self.lifetime is not None:
            active = self.queries.position[:, None] <= self.lifetime.cpu()[:, None, :]  # [Hk, queries, keys]
            visible &= active.repeat_interleave(self.heads // len(self.lifetime), dim=0)
        return visible

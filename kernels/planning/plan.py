"""Plan: what attention of some query rows to some key rows has to compute; made before any tensor is touched."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.regions import Kind, Region, cut_regions


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """What some of the query heads have in common: one visibility, and the disjoint regions with its visible pairs."""

    heads: tuple[int, ...]
    attention_mask: AttentionMask
    regions: tuple[Region, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which query rows attend to which key rows: those that `attention_mask` shows and, where there is one, that
    `selection` names.

    lifetime: int32 `[Hk, keys]`, or None: the last query position that sees each key of each KV head (-1: none does).
    """

    queries: Rows
    keys: Rows
    attention_mask: AttentionMask
    heads: int
    parts: tuple[HeadPlan, ...]
    selection: BlockSelection | None
    lifetime: Tensor | None = None
    derived: dict[Hashable, Any] = field(default_factory=dict, init=False)
    """What backends made of the plan, by keys of their own: once for forward and backward, and for all layers."""

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
        selection: BlockSelection | None = None,
        shortest_run: int = 32,
    ) -> "Plan":
        """Plan attention of `heads` query heads; runs shorter than `shortest_run` rows are tiled instead.

        Raises ValueError when windows or selection are for another number of heads or queries.
        """
        parts = tuple(
            HeadPlan(tuple(group), uniform, cut_regions(queries, keys, uniform, shortest_run))
            for uniform, group in attention_mask.by_heads(heads).items()
        )
        plan = Plan(queries=queries, keys=keys, attention_mask=attention_mask, heads=heads, parts=parts, selection=None)
        return plan if selection is None else plan.choosing(selection)

    def choosing(self, selection: BlockSelection) -> "Plan":
        """Return the same plan, of whose keys the queries see only those that `selection` chose."""
        if self.heads % selection.heads or len(selection.unit) != len(self.queries):
            raise ValueError(
                f"a selection for {selection.heads} heads and {len(selection.unit)} queries cannot go with a plan for "
                f"{self.heads} heads and {len(self.queries)} queries"
            )
        return replace(self, selection=selection)

    def living(self, lifetime: Tensor) -> "Plan":
        """Return the same plan, of whose keys the queries see only those still alive at their positions."""
        if lifetime.dtype != torch.int32 or lifetime.dim() != 2 or lifetime.shape[1] != len(self.keys):
            raise ValueError(
                f"lifetimes must be int32 [KV heads, {len(self.keys)}], not {lifetime.dtype} {list(lifetime.shape)}"
            )
        return replace(self, lifetime=lifetime)

    @property
    def is_empty(self) -> bool:
        """Whether no query sees any key, as far as visibility goes."""
        return not any(part.regions for part in self.parts)

    @cached_property
    def unmasked_pairs(self) -> int:
        """The number of (query, key) pairs that visibility shows, the mean over heads."""
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
            edge = min(num_queries, num_keys)
            return edge * (edge + 1) // 2 + (num_queries - edge) * num_keys
        if region.kind is Kind.ANTICAUSAL:
            return num_queries * (num_queries + 1) // 2
        return int(self.region_mask(attention_mask, region).sum())

    def region_mask(self, attention_mask: AttentionMask, region: Region) -> Tensor:
        """Return which pairs of the region are visible, bool `[region's queries, region's keys]`."""
        return attention_mask.mask(self.queries.slice(region.queries), self.keys.slice(region.keys))

    def mask(self) -> Tensor:
        """Return the definition of the whole plan, bool `[heads, queries, keys]`; quadratic, for references."""
        visible = torch.empty(self.heads, len(self.queries), len(self.keys), dtype=torch.bool)
        for part in self.parts:
            visible[list(part.heads)] = part.attention_mask.mask(self.queries, self.keys)
        if self.selection is not None:
            visible &= self.selection.mask(self.keys).repeat_interleave(self.heads // self.selection.heads, dim=0)
        if self.lifetime is not None:
            alive = self.queries.position[:, None] <= self.lifetime[:, None, :]
            visible &= alive.repeat_interleave(self.heads // len(self.lifetime), dim=0)
        return visible

"""Which keys a plan's queries need, to a row: what a strategy that moves only those sends."""

from dataclasses import replace

import torch
from torch import Tensor

from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.regions import Kind, Region


def needed_keys(plan: Plan, kv_heads: int, *, groups: int = 1) -> Tensor:
    """Return the keys of each KV head that queries see, bool `[groups, Hk, keys]`.

    groups: equal parts that the queries are cut into, each with its needs. Where queries choose: keys that some query
    of the group sees, in a block that some query of it chose.
    """
    of_head = plan.heads // kv_heads
    needed = torch.zeros(groups, kv_heads, len(plan.keys), dtype=torch.bool)
    for part in plan.parts:
        seen = _seen_keys(plan, part, groups)
        for head in {head // of_head for head in part.heads}:
            needed[:, head] |= seen
    if plan.selection is not None:
        units = plan.selection.query_block.view(groups, -1)
        for group, unit in enumerate(units):
            needed[group] &= _chosen_keys(plan, replace(plan.selection, query_block=unit), kv_heads)
    return needed


def _seen_keys(plan: Plan, part: HeadPlan, groups: int) -> Tensor:
    """Return the keys that each group of queries sees by the visibility of some heads, bool `[groups, keys]`."""
    size = max(len(plan.queries) // groups, 1)
    edges = torch.zeros(groups, len(plan.keys) + 1, dtype=torch.int32)
    seen = torch.zeros(groups, len(plan.keys), dtype=torch.bool)
    for region in part.regions:
        mask = plan.region_mask(part.attention_mask, region) if region.kind is Kind.MASKED else None
        for group in range(region.query_start // size, (region.query_stop - 1) // size + 1):
            first = max(region.query_start, group * size) - region.query_start
            last = min(region.query_stop, (group + 1) * size) - 1 - region.query_start
            if mask is not None:
                seen[group, region.keys] |= mask[first : last + 1].any(dim=0)
                continue
            start, stop = _interval(region, first, last)
            edges[group, start] += 1
            edges[group, stop] -= 1
    return seen | (edges.cumsum(dim=1)[:, :-1] > 0)


def _interval(region: Region, first: int, last: int) -> tuple[int, int]:
    """Return the keys that the queries `first` to `last` of a region, counted from its start, see: start and stop."""
    if region.kind is Kind.CAUSAL:
        return region.key_start, min(region.key_stop, region.key_start + last + 1)
    if region.kind is Kind.ANTICAUSAL:
        return region.key_start + first, region.key_stop
    return region.key_start, region.key_stop


def _chosen_keys(plan: Plan, selection: BlockSelection, kv_heads: int) -> Tensor:
    """Return the keys of each KV head whose block some query chose, bool `[Hk, keys]`."""
    asks = torch.zeros(selection.heads, selection.num_query_blocks, dtype=torch.bool)
    asks[:, selection.query_block[selection.query_block >= 0]] = True
    asked = asks.flatten()[selection.lists]
    block = torch.zeros(selection.heads, selection.blocks.count + 1, dtype=torch.bool)
    block[selection.lists[asked] // max(selection.num_query_blocks, 1), selection.key_blocks[asked].long()] = True
    block = block.view(kv_heads, -1, selection.blocks.count + 1).any(dim=1)
    return block[:, selection.blocks.of(plan.keys)]

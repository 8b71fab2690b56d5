"""The keys that the queries of a plan require, row by row, for strategies that send no others."""

from dataclasses import replace

import torch
from torch import Tensor

from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.regions import Kind, Region


def required_keys(plan: Plan, kv_heads: int, *, groups: int = 1) -> Tensor:
    """Return the keys of each KV head that queries see, bool `[groups, Hk, keys]`.

    groups: equal parts of the queries, each with requirements of its own. With a selection: the keys that some query of
    the group sees, in a block that some query of the group selected.
    """
    heads_per_kv_head = plan.heads // kv_heads
    required = torch.zeros(groups, kv_heads, len(plan.keys), dtype=torch.bool)
    for part in plan.parts:
        unmasked = _unmasked_keys(plan, part, groups)
        for kv_head in {head // heads_per_kv_head for head in part.heads}:
            required[:, kv_head] |= unmasked
    if plan.selection is not None:
        selection = plan.selection.as_lists
        query_blocks = selection.query_block.view(groups, -1)  # [queries] -> [groups, queries / groups]
        key_block = selection.blocks.of(plan.keys)
        for group, query_block in enumerate(query_blocks):
            selected = replace(selection, query_block=query_block).selected_blocks()
            required[group] &= keys_of_blocks(selected, key_block, kv_heads)
    return required


def _unmasked_keys(plan: Plan, part: HeadPlan, groups: int) -> Tensor:
    """Return the keys that each group of queries sees under the mask of some heads, bool `[groups, keys]`."""
    size = max(len(plan.queries) // groups, 1)
    # Intervals of keys as differences: +1 at the start, -1 at the stop; their running sum counts open intervals.
    differences = torch.zeros(groups, len(plan.keys) + 1, dtype=torch.int32)
    unmasked = torch.zeros(groups, len(plan.keys), dtype=torch.bool)
    for region in part.regions:
        mask = plan.region_mask(part.attention_mask, region) if region.kind is Kind.MASKED else None
        for group in range(region.query_start // size, (region.query_stop - 1) // size + 1):
            first = max(region.query_start, group * size) - region.query_start
            last = min(region.query_stop, (group + 1) * size) - 1 - region.query_start
            if mask is not None:
                unmasked[group, region.keys] |= mask[first : last + 1].any(dim=0)
                continue
            start, stop = _interval(region, first, last)
            differences[group, start] += 1
            differences[group, stop] -= 1
    return unmasked | (differences.cumsum(dim=1)[:, :-1] > 0)


def _interval(region: Region, first: int, last: int) -> tuple[int, int]:
    """Return start and stop of the keys that the queries `first` to `last` of a region see."""
    if region.kind is Kind.CAUSAL:
        return region.key_start, min(region.key_stop, region.key_start + last + 1)
    if region.kind is Kind.ANTICAUSAL:
        return region.key_start + first, region.key_stop
    return region.key_start, region.key_stop


def keys_of_blocks(selected: Tensor, key_block: Tensor, kv_heads: int) -> Tensor:
    """Return the keys of each KV head in selected blocks, bool `[Hk, keys]`.

    selected: bool `[selecting heads, blocks + 1]`, False for the last. key_block: of each key, int64 `[keys]`; -1 for
    padding.
    """
    # [selecting heads, blocks + 1] -> [Hk, selecting heads / Hk, blocks + 1] -> [Hk, blocks + 1]
    return selected.unflatten(0, (kv_heads, -1)).any(dim=1)[:, key_block]

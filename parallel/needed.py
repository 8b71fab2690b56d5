"""Which keys a plan's queries need: what a strategy that moves only those sends."""

import torch
from torch import Tensor

from farspan.kernels.plan import Plan
from farspan.kernels.selection import Selection


def needed_keys(plan: Plan, kv_heads: int) -> Tensor:
    """Return the keys of each KV head that some query sees, bool `[Hk, keys]`.

    As far as regions tell: a region whose mask has to be computed needs all of its keys.
    """
    group = plan.heads // kv_heads
    needed = torch.zeros(kv_heads, len(plan.keys), dtype=torch.bool)
    for part in plan.parts:
        edges = torch.zeros(len(plan.keys) + 1, dtype=torch.int64)
        for region in part.regions:
            edges[region.key_start] += 1
            edges[region.key_stop] -= 1
        covered = edges.cumsum(0)[:-1] > 0
        for head in {head // group for head in part.heads}:
            needed[head] |= covered
    if plan.selection is not None:
        needed &= _chosen_keys(plan, plan.selection, kv_heads)
    return needed


def _chosen_keys(plan: Plan, selection: Selection, kv_heads: int) -> Tensor:
    """Return the keys of each KV head whose block some query chose, bool `[Hk, keys]`."""
    present = torch.zeros(selection.num_units, dtype=torch.bool)
    present[selection.unit[selection.unit >= 0]] = True
    counts = present * selection.offsets.diff().view(selection.heads, -1)
    block = torch.zeros(selection.heads, selection.blocks.count + 1, dtype=torch.bool)
    head = torch.arange(selection.heads).repeat_interleave(selection.offsets.diff().view(selection.heads, -1).sum(1))
    chosen = selection.chosen.long()
    asked = (counts > 0).flatten()[selection.lists]
    block[head[asked], chosen[asked]] = True
    block = block.view(kv_heads, -1, selection.blocks.count + 1).any(dim=1)
    return block[:, selection.blocks.of(plan.keys)]

"""Ranking of scores with a fixed rule for ties, the same on every device and number of ranks."""

import torch
from torch import Tensor


def affinity(q: Tensor, summary: Tensor) -> Tensor:
    """Return q . summary, float32 `[heads, queries, blocks]`, of q `[queries, Hq, D]` and summary `[blocks, Hk, D]`.

    Products and sums are float64 and rounded once, so that the order of summation does not show.
    """
    group = q.shape[1] // summary.shape[1]
    keys = summary.double().permute(1, 2, 0).repeat_interleave(group, dim=0)  # [Hq, D, blocks]
    return torch.bmm(q.transpose(0, 1).double(), keys).float()


def top(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` highest float32 scores of the last dimension; the lower place wins a tie.

    -inf is never chosen: -1 fills up where there are fewer. int64 `[..., min(count, width)]`, best first.
    """
    width = scores.shape[-1]
    # A float's bits, read as an integer, sort like the float once those of negative numbers are turned round.
    bits = (scores + 0.0).view(torch.int32).long()
    order = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)
    places = torch.arange(width, device=scores.device)
    unique = (order << 32) + (width - 1 - places)
    best = unique.topk(min(count, width), dim=-1).values
    chosen = width - 1 - (best & 0xFFFFFFFF)
    return chosen.masked_fill(scores.gather(-1, chosen) == float("-inf"), -1)

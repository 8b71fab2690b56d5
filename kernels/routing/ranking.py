"""Ranking of scores with a fixed rule for ties, the same on every device and number of ranks."""

import torch
from torch import Tensor


def affinity(q: Tensor, summary: Tensor) -> Tensor:
    """q . summary, float32 `[Hq, queries, blocks]`, of q `[queries, Hq, D]` and summary `[blocks, Hk, D]`.

    Products and sums are float64 and rounded once: the result does not depend on the order of summation.
    """
    group = q.shape[1] // summary.shape[1]
    keys = summary.double().permute(1, 2, 0).repeat_interleave(group, dim=0)  # [blocks, Hk, D] -> [Hq, D, blocks]
    return torch.bmm(q.transpose(0, 1).double(), keys).float()


def sortable(scores: Tensor) -> Tensor:
    """int64 that sort as the float32 `scores` do, from -2^31 to 2^31 - 1; 0 and -0 are equal."""
    # A float's bits, read as an integer, sort like the float once the lower 31 of negative numbers are inverted.
    bits = (scores + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).long()


def sortable_from_zero(scores: Tensor) -> Tensor:
    """The same from 0 to 2^32 - 1."""
    return sortable(scores) + (1 << 31)


def from_sortable(keys: Tensor) -> Tensor:
    """The float32 scores of keys made by `sortable_from_zero`."""
    order = (keys - (1 << 31)).clamp(-(1 << 31), (1 << 31) - 1)
    bits = torch.where(order < 0, (-1 - order) | -(1 << 31), order)
    return bits.to(torch.int32).view(torch.float32)


_NEVER = -1 - 0x7F800000
"""`sortable` of -inf."""


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest float32 scores of the last dimension; the lower index wins a tie.

    int64 `[..., min(count, width)]`, best first; -inf is never chosen: -1 fills up where there are fewer.
    """
    width = scores.shape[-1]
    index = torch.arange(width, device=scores.device)
    # Score above, reversed index below: all values differ, so topk has no ties to break its own way.
    unique = sortable(scores).bitwise_left_shift_(32).add_(width - 1 - index)
    best = unique.topk(min(count, width), dim=-1).values
    chosen = width - 1 - (best & 0xFFFFFFFF)
    return chosen.masked_fill_((best >> 32) == _NEVER, -1)


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """How many of the same group score higher, or as high and come earlier; int64 `[n, lists]`.

    scores: float32 `[n, lists]`, each column ranked by itself. group: int64 `[n]`, from 0.
    """
    worst_first = -sortable(scores) - 1
    order = ((group[:, None] << 32) + worst_first).sort(dim=0, stable=True).indices
    # Sorted, all columns have the same groups in the same places: ranks count from the first place of each.
    sorted_group = group.sort().values
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(sorted_group, sorted_group)
    return torch.zeros_like(order).scatter_(0, order, rank[:, None].expand_as(order))


def best_in_groups(scores: Tensor, group: Tensor, ranks: Tensor) -> Tensor:
    """Indices of the best of each group, ascending, the earlier of equals; int64 `[lists, chosen]`.

    scores: float32 `[lists, n]`, each list ranked by itself. group: int64 `[n]`, from 0, ascending. ranks: of those to
    take among all, the best of each group first, int64 `[chosen]`.
    """
    order = ((group << 32) + ~sortable(scores)).sort(dim=1, stable=True).indices
    return order[:, ranks].sort(dim=1).values


def rank_among_earlier(scores: Tensor, group: Tensor) -> Tensor:
    """How many earlier ones of the same group score at least as high; int64 `[n, lists]`.

    scores: float32 `[n, lists]`, each column ranked by itself. group: int64 `[n]`, from 0, ascending.
    Merge counting: at each level the later half of every interval is compared with the sorted earlier half.
    """
    count, lists = scores.shape
    size = 1 << max(count - 1, 0).bit_length()
    # Earlier groups sort below all of this one, so that none of them is counted.
    keys = torch.full((lists, size), torch.iinfo(torch.int64).max, device=scores.device)
    keys[:, :count] = ((group[:, None] << 32) + sortable(scores)).t()
    ranks = torch.zeros_like(keys)
    half = 1
    while half < size:
        # [lists, size] -> [lists, size / (2 half), 2, half]
        earlier, later = keys.view(lists, -1, 2, half).unbind(dim=2)
        lower = torch.searchsorted(earlier.sort(dim=2).values, later.contiguous())
        ranks.view(lists, -1, 2, half)[:, :, 1] += half - lower
        half *= 2
    return ranks[:, :count].t()

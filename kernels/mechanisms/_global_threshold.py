"""A global threshold over scores spread over ranks: radix select of the best (query, block) pairs up to a weight.

Each pass over the scores fixes one 8-bit digit of the threshold by a histogram, summed over ranks: no rank ever needs
the scores of another, and no sort is needed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.routing.ranking import sortable_from_zero

DIGIT_BITS = 8
KEY_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Some of the pairs to rank: those of some queries with all blocks.

    scores: float32 `[lists, queries, blocks]`. weight: int64 of the same shape, 0 for pairs that do not take part.
    group: int64 `[queries]`, groups are ranked separately; -1 takes no part.
    """

    scores: Tensor
    weight: Tensor
    group: Tensor


def find_threshold(pairs: Callable[[], Iterator[Pairs]], need: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The greatest key such that pairs with this key or above weigh `need` or more, int64 `[lists, groups]`.

    Keys are those of `sortable_from_zero`. need: int64 `[lists, groups]`. Where all pairs weigh less, the threshold is
    0; where nothing is needed, it is above all keys. `pairs` is called once per digit of the key. Weights are integers
    and their sums exact, so ranks and their order make no difference.
    """
    threshold, left = torch.zeros_like(need), need
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        weights = need.new_zeros(*need.shape, 1 << DIGIT_BITS)  # histogram [lists, groups, digits]
        for part in pairs():
            keys, group = sortable_from_zero(part.scores), part.group.clamp(min=0)
            # Only keys that share the digits fixed so far compete for the next one.
            leads = keys >> (shift + DIGIT_BITS) == (threshold >> (shift + DIGIT_BITS))[:, group, None]
            digit = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            index = (group[None, :, None] << DIGIT_BITS) + digit  # [lists, queries, blocks], in [0, groups * digits)
            counted = torch.where(leads & (part.group >= 0)[:, None], part.weight, 0)
            # [lists, groups, digits] -> [lists, groups * digits]
            weights.flatten(1).scatter_add_(1, index.flatten(1), counted.flatten(1))
        from_digit = total(weights).flip(-1).cumsum(-1).flip(-1)  # weight of this digit and all above
        digit = ((from_digit >= left.unsqueeze(-1)).sum(dim=-1) - 1).clamp(min=0)
        # The weight of greater digits is selected in any case; the rest must come from this digit.
        beyond = torch.cat((from_digit[..., 1:], torch.zeros_like(from_digit[..., :1])), dim=-1)
        left = left - beyond.gather(-1, digit.unsqueeze(-1)).squeeze(-1)
        threshold = threshold + (digit << shift)
    return threshold.masked_fill(need <= 0, 1 << KEY_BITS)


def threshold_bytes(lists: int, groups: int) -> int:
    """Bytes that `find_threshold` sums over ranks."""
    return KEY_BITS // DIGIT_BITS * lists * groups * (1 << DIGIT_BITS) * torch.int64.itemsize

"""Where to cut a ranking that no one holds whole: the best pairs of (query, block) up to a weight, over all holders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.routing.ranking import sortable_from_zero

DIGIT_BITS = 8
KEY_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Some of the pairs to be ranked: those of some queries with all blocks.

    scores: float32 `[lists, queries, blocks]`. weight: int64 of the same shape, 0 for pairs that do not take part.
    group: int64 `[queries]`, each ranked by itself.
    """

    scores: Tensor
    weight: Tensor
    group: Tensor


def find_cut(pairs: Callable[[], Iterator[Pairs]], need: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the greatest key from which on the pairs of a list and group weigh `need` or more; int64, as `need`.

    Keys are those of `sortable_from_zero`. need: int64 `[lists, groups]`. Where all pairs weigh less, the cut is 0;
    where nothing is needed, it is above all keys. Pairs are gone through once per digit of the key: weights are
    integers and their sums exact, so that holders and their order make no difference.
    """
    cut, left = torch.zeros_like(need), need
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        weights = need.new_zeros(*need.shape, 1 << DIGIT_BITS)
        for part in pairs():
            keys, group = sortable_from_zero(part.scores), part.group.clamp(min=0)
            leads = keys >> (shift + DIGIT_BITS) == (cut >> (shift + DIGIT_BITS))[:, group, None]
            digit = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            place = (group[None, :, None] << DIGIT_BITS) + digit
            counted = torch.where(leads & (part.group >= 0)[:, None], part.weight, 0)
            weights.flatten(1).scatter_add_(1, place.flatten(1), counted.flatten(1))
        from_digit = total(weights).flip(-1).cumsum(-1).flip(-1)
        digit = ((from_digit >= left.unsqueeze(-1)).sum(dim=-1) - 1).clamp(min=0)
        beyond = torch.cat((from_digit[..., 1:], torch.zeros_like(from_digit[..., :1])), dim=-1)
        left = left - beyond.gather(-1, digit.unsqueeze(-1)).squeeze(-1)
        cut = cut + (digit << shift)
    return cut.masked_fill(need <= 0, 1 << KEY_BITS)


def cut_bytes(lists: int, groups: int) -> int:
    """Return the bytes of what `find_cut` has summed over holders."""
    return KEY_BITS // DIGIT_BITS * lists * groups * (1 << DIGIT_BITS) * torch.int64.itemsize

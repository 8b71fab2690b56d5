"""Ragged lists set end to end (CSR) and runs of equal values, as index arithmetic without a loop over the lists.

Three lists of 2, 0 and 3 entries, counts = [2, 0, 3]:

    offsets_of(counts)              [0, 2, 2, 5]           list i is entries[offsets[i]:offsets[i + 1]]
    expand(counts)                  [0, 0, 2, 2, 2]        the list of each entry
                                    [0, 1, 0, 1, 2]        and its index in that list
    ranges([7, 0, 4], [9, 0, 7])    [7, 8, 4, 5, 6]        np.arange(start, stop) of each pair
    runs([5, 5, 8, 8, 8])           [0, 2], [2, 5]         where each run of equal values starts and stops
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def offsets_of(counts: Tensor) -> Tensor:
    """Where each list starts and the last one stops, `[lists + 1]`, of their lengths (flattened)."""
    return torch.cat((counts.new_zeros(1), counts.flatten().cumsum(0)))


def take_or(x: Tensor, index: Tensor, fill: int) -> Tensor:
    """x `[..., rows]` at `index`, int64 `[n]`, of its last dimension; an index of -1 gives `fill`."""
    # -1 indexes the extra element at the end, which also serves where there are no rows.
    return torch.cat((x, x.new_full((*x.shape[:-1], 1), fill)), dim=-1)[..., index]


def expand(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """The list of each entry and its index in that list, int64 `[entries]`, of the lists' int64 lengths `[lists]`.

    total: the number of entries, so that the host need not wait for lengths on a device.
    """
    number = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return number, torch.arange(len(number), device=counts.device) - first[number]


def ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """start[0], ..., stop[0] - 1, start[1], ..., one range after another."""
    sizes = stop - start
    if (sizes == 1).all():
        return start
    return np.arange(sizes.sum()) + np.repeat(start - np.cumsum(sizes) + sizes, sizes)


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal values, none of them negative, starts and stops."""
    start = np.flatnonzero(np.diff(values, prepend=-1))
    return start, np.append(start[1:], len(values))[: len(start)]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Members of groups, none empty, one group after another: member[start[i]:stop[i]] belong to group number[i]."""

    number: np.ndarray
    member: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @staticmethod
    def by(number: np.ndarray) -> "Groups":
        """Group the indices of `number` by its values, both ascending; an index with a -1 is in no group."""
        order = np.argsort(number, kind="stable")
        order = order[np.searchsorted(number[order], 0) :]
        start, stop = runs(number[order])
        return Groups(number[order][start], order, start, stop)

    def __len__(self) -> int:
        return len(self.number)

    def sizes(self) -> np.ndarray:
        return self.stop - self.start

    def members(self, groups: np.ndarray) -> np.ndarray:
        """The members of groups i, j, ..., one group after another."""
        return self.member[ranges(self.start[groups], self.stop[groups])]

    def of_number(self, count: int) -> np.ndarray:
        """The group of each of the numbers 0 to count - 1, int32 `[count]`; -1 where there is none."""
        index = np.full(count, -1, dtype=np.int32)
        index[self.number] = np.arange(len(self))
        return index


def group_equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each distinct value in ascending order, its indices, ascending; values are not negative."""
    if not len(values):
        return
    if values.max() < 1 << 16:
        # numpy sorts 16 bits by radix, anything wider by comparisons.
        order, counts = np.argsort(values.astype(np.uint16), kind="stable"), np.bincount(values)
        yield from np.split(order, np.cumsum(counts[counts > 0])[:-1])
    else:
        order = np.argsort(values, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def chunks_by_budget(costs: np.ndarray, budget: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive [start, stop) whose costs sum up to at most `budget`; at least one item each."""
    ends, start = np.cumsum(costs), 0
    while start < len(ends):
        limit = (ends[start - 1] if start else 0) + budget
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, stop
        start = stop

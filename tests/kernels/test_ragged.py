import numpy as np
import pytest
import torch

from farspan.kernels.ragged import chunks_by_budget, expand, group_equal, offsets_of, ranges, runs


@pytest.mark.parametrize("counts", [[2, 0, 3], [1, 1, 1], [0, 0], []])
def test_lists_set_end_to_end(counts: list[int]) -> None:
    tensor, array = torch.tensor(counts, dtype=torch.int64), np.array(counts, dtype=np.int64)
    assert offsets_of(tensor).tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
    number, nth = expand(tensor)
    pairs = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    assert list(zip(number.tolist(), nth.tolist(), strict=True)) == pairs
    start = 7 * np.arange(len(counts))
    assert ranges(start, start + array).tolist() == [7 * i + j for i, j in pairs]


@pytest.mark.parametrize("scale", [1, 1 << 20])
def test_equal_values(scale: int) -> None:
    values = np.array([5, 5, 8, 5, 0, 0]) * scale
    assert [x.tolist() for x in runs(values)] == [[0, 2, 3, 4], [2, 3, 4, 6]]
    assert [x.tolist() for x in group_equal(values)] == [[4, 5], [0, 1, 3], [2]]
    assert list(group_equal(values[:0])) == []


def test_chunks_fit_the_budget_or_are_one_item() -> None:
    assert list(chunks_by_budget(np.array([3, 4, 9, 0, 1, 6]), 7)) == [(0, 2), (2, 3), (3, 6)]
    assert list(chunks_by_budget(np.array([], dtype=np.int64), 7)) == []

"""Rings within rings: who has whose chunk when."""

import pytest

from farspan.parallel.context_parallel.ring_exchange import Rings

SHAPES = [(1, 1), (4, 4), (4, 2), (4, 1), (8, 2), (8, 4), (12, 3), (512, 8)]


@pytest.mark.parametrize(("size", "width"), SHAPES)
def test_every_rank_has_every_chunk_once_and_every_chunk_one_holder(size: int, width: int) -> None:
    rings = Rings(size=size, width=width)
    for rank in range(0, size, max(size // 8, 1)):
        assert sorted(rings.owner(rank, step) for step in range(size)) == list(range(size))
    for step in range(0, size, max(size // 8, 1)):
        assert sorted(rings.owner(rank, step) for rank in range(size)) == list(range(size))
        assert all(rings.holder(rings.owner(rank, step), step) == rank for rank in range(size))


def test_a_chunk_crosses_neighbourhoods_once_a_round() -> None:
    """8 ranks in pairs: the chunk of rank 0 goes to its neighbor, then to the next pair, and comes home."""
    rings = Rings(size=8, width=2)
    assert [rings.holder(0, step) for step in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert [rings.holder(1, step) for step in range(9)] == [1, 0, 3, 2, 5, 4, 7, 6, 1]
    assert [rings.owner(0, step) for step in range(8)] == [0, 1, 6, 7, 4, 5, 2, 3]

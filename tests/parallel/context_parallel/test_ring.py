"""Rings within a ring: which rank has which chunk at each step."""

import pytest

from farspan.parallel.context_parallel.strategies.ring import RingTopology

SHAPES = [(1, 1), (4, 4), (4, 2), (4, 1), (8, 2), (8, 4), (12, 3), (512, 8)]


@pytest.mark.parametrize(("size", "inner_size"), SHAPES)
def test_every_rank_has_every_chunk_once_and_every_chunk_one_rank(size: int, inner_size: int) -> None:
    ring = RingTopology(size=size, inner_size=inner_size)
    for rank in range(0, size, max(size // 8, 1)):
        assert sorted(ring.owner_at(rank, step) for step in range(size)) == list(range(size))
    for step in range(0, size, max(size // 8, 1)):
        assert sorted(ring.owner_at(rank, step) for rank in range(size)) == list(range(size))
        assert all(ring.rank_with_chunk(ring.owner_at(rank, step), step) == rank for rank in range(size))


def test_a_chunk_crosses_node_groups_once_a_round() -> None:
    """8 ranks in pairs: the chunk of rank 0 goes to its neighbor, then to the next pair, and returns."""
    ring = RingTopology(size=8, inner_size=2)
    assert [ring.rank_with_chunk(0, step) for step in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert [ring.rank_with_chunk(1, step) for step in range(9)] == [1, 0, 3, 2, 5, 4, 7, 6, 1]
    assert [ring.owner_at(0, step) for step in range(8)] == [0, 1, 6, 7, 4, 5, 2, 3]

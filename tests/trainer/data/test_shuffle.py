import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from farspan.trainer.data.packing import PackedSequences, ShuffledSequences, shuffled_place
from farspan.trainer.data.source import TokenSource


@pytest.fixture
def source(make_source: Callable[[Sequence[int]], TokenSource]) -> TokenSource:
    return make_source((30, 3, 11, 1, 47, 8))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_it_is_a_permutation(count: int) -> None:
    assert sorted(shuffled_place(i, count, "7/0") for i in range(count)) == list(range(count))


def test_orders_differ_and_look_random() -> None:
    orders = [[shuffled_place(i, 1000, key) for i in range(1000)] for key in ("0/0", "0/1", "1/0")]
    for one, other in itertools.combinations([*orders, list(range(1000))], 2):
        # Two random permutations have on average one element at the same index.
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
    for order in orders:
        neighbors = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
        assert neighbors < 15
        assert abs(np.mean(order[:500]) - 499.5) < 60


def test_the_order_is_pinned() -> None:
    """A resumed run reads on in the same order, whatever the versions of Python and numpy: never change this."""
    assert [shuffled_place(i, 10, "0/0") for i in range(10)] == [9, 8, 0, 1, 7, 5, 6, 4, 2, 3]


@pytest.mark.parametrize("length", [1, 7, 40, 101, 250])
def test_each_epoch_has_the_sequences_that_start_in_it(source: TokenSource, length: int) -> None:
    packed = PackedSequences(source, sequence_tokens=length, seed=3)
    shuffled = ShuffledSequences(source, sequence_tokens=length, seed=3)
    epochs = 4

    def content(sequences: PackedSequences, index: int) -> tuple[bytes, ...]:
        sequence = sequences.sequence(index)
        return tuple(getattr(sequence, name).tobytes() for name in ("tokens", "labels", "position", "document"))

    first = 0
    moved = 0
    for epoch in range(epochs):
        stop = first
        while stop * length < (epoch + 1) * source.num_tokens:
            stop += 1
        in_order = [content(packed, i) for i in range(first, stop)]
        reordered = [content(shuffled, i) for i in range(first, stop)]
        assert sorted(in_order) == sorted(reordered)
        moved += in_order != reordered
        first = stop
    assert moved > 0 or length > 100
    with pytest.raises(IndexError, match="sequence -1"):
        shuffled.sequence(-1)

import pytest
import torch

from farspan.kernels.linear_attention.state import NO_POSITION, Segment, SequencePosition, empty_state, order
from farspan.kernels.masks.rows import PADDING, Rows


def rows(document: list[int], position: list[int]) -> Rows:
    return Rows(position=torch.tensor(position, dtype=torch.int32), document=torch.tensor(document, dtype=torch.int32))


def test_ends_of_a_segment() -> None:
    segment = Segment.of(rows([7, 7, 3, 3, 3, -1], [4, 9, 0, 2, 5, 0]))
    assert (len(segment), segment.tokens) == (6, 5)
    assert (segment.first, segment.last) == (SequencePosition(7, 4), SequencePosition(3, 5))
    for nothing in (Rows.packed([]), Rows.packed([], padding=3)):
        segment = Segment.of(nothing)
        assert (segment.tokens, segment.first, segment.last) == (0, NO_POSITION, NO_POSITION)


@pytest.mark.parametrize(
    ("document", "position", "message"),
    [
        ([0, 0], [1, 0], "order of their positions"),
        ([0, 0], [1, 1], "order of their positions"),
        ([0, 1, 0], [0, 0, 1], "documents one after another"),
        ([-1, 0], [0, 0], "documents one after another, then padding"),
        ([0, -1, 0], [0, 0, 1], "documents one after another, then padding"),
    ],
)
def test_rows_in_another_order_are_refused(document: list[int], position: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment.of(rows(document, position))


def test_order_makes_a_segment_of_any_rows() -> None:
    packed = Rows.packed([3, 1, 70_000], padding=4)
    shuffled = packed.take(torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="sort them"):
        Segment.of(shuffled)
    ordered = Segment.of(shuffled.take(order(shuffled))).rows
    assert torch.equal(ordered.position, packed.position)
    assert torch.equal(ordered.document, packed.document)
    assert ordered.document[-1] == PADDING


def test_an_empty_state_is_zeros_in_the_accumulation_dtype() -> None:
    state = empty_state(3, 4, 5, like=torch.zeros(1, dtype=torch.bfloat16))
    assert (state.value.shape, state.value.dtype, state.last) == ((3, 4, 5), torch.float32, NO_POSITION)
    assert not state.value.any()

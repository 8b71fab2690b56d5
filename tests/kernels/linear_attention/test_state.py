import pytest
import torch

from farspan.kernels.linear_attention.segment import SequencePosition
from farspan.kernels.linear_attention.state import State, empty_state, merge_states

DECAY = torch.tensor([0.0, 0.5, 1e4], dtype=torch.float64)


def state(seed: int, document: int, position: int) -> State:
    value = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return State(value, SequencePosition(document, position))


def test_the_later_state_decays_the_earlier_of_its_document() -> None:
    earlier, later = state(0, 2, 10), state(1, 2, 13)
    merged = merge_states(earlier, later, DECAY)
    assert merged.place == later.place
    for head, kept in enumerate([1.0, torch.e**-1.5, 0.0]):
        assert torch.allclose(merged.value[head], kept * earlier.value[head] + later.value[head], rtol=1e-14)


def test_another_document_starts_anew_and_nothing_changes_nothing() -> None:
    earlier, later, empty = state(0, 2, 10), state(1, 3, 0), empty_state(3, 4, 5, like=DECAY)
    assert merge_states(earlier, later, DECAY) is later
    assert merge_states(earlier, empty, DECAY) is earlier
    assert merge_states(empty, later, DECAY) is later
    assert empty_state(3, 4, 5, like=DECAY.bfloat16()).value.dtype == torch.float32


def test_states_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="the later stretch comes second"):
        merge_states(state(0, 2, 13), state(1, 2, 10), DECAY)


@pytest.mark.parametrize("documents", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 2, 3), (1, -1, 1), (-1, -1, 1), (1, 1, -1)])
def test_merging_is_associative(documents: tuple[int, int, int]) -> None:
    a, b, c = (
        state(i, document, 5 * i) if document >= 0 else empty_state(3, 4, 5, like=DECAY)
        for i, document in enumerate(documents)
    )
    left = merge_states(merge_states(a, b, DECAY), c, DECAY)
    right = merge_states(a, merge_states(b, c, DECAY), DECAY)
    assert left.place == right.place
    assert torch.allclose(left.value, right.value, rtol=1e-14)

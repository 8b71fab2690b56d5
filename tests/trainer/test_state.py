import pytest
import torch

from farspan.trainer.state import TrainState


def drawn(state: TrainState, seed: int, data_rank: int) -> list[float]:
    state.seed_step(seed, data_rank)
    return torch.rand(4).tolist()


def test_random_numbers_are_a_function_of_seed_step_and_group() -> None:
    first = drawn(TrainState(step=5), seed=1, data_rank=0)
    torch.rand(3)
    resumed = TrainState()
    resumed.load_state_dict(TrainState(step=5, sequences=9, tokens=99).state_dict())
    assert drawn(resumed, seed=1, data_rank=0) == first
    others = [
        drawn(TrainState(step=6), seed=1, data_rank=0),
        drawn(TrainState(step=5), seed=2, data_rank=0),
        drawn(TrainState(step=5), seed=1, data_rank=1),
        drawn(TrainState(step=1), seed=5, data_rank=0),
    ]
    assert len({tuple(numbers) for numbers in [first, *others]}) == 5


def test_a_state_comes_back_whole() -> None:
    saved = TrainState(step=3, sequences=12, tokens=1000)
    loaded = TrainState()
    loaded.load_state_dict(saved.state_dict())
    assert loaded == saved


def test_a_cut_state_is_refused_and_changes_nothing() -> None:
    state = TrainState(step=7)
    with pytest.raises(KeyError, match="tokens"):
        state.load_state_dict({"step": 3, "sequences": 12})
    assert state == TrainState(step=7)

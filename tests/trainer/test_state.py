import json

import pytest

from farspan.trainer.resilience.skip_steps import SkipConfig, remember
from farspan.trainer.state import TrainState, stream_hash


def test_a_state_comes_back_complete() -> None:
    saved = TrainState(step=3, sequences=12, tokens=1000, stream="a", skipped=2, recent_losses=[0.1, 1 / 3])
    loaded = TrainState()
    loaded.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert loaded == saved


def test_what_a_save_in_the_background_writes_does_not_follow_the_run() -> None:
    state, config = TrainState(step=3, recent_losses=[1.0], recent_norms=[2.0]), SkipConfig(spike_sigma=3.0)
    saved = state.state_dict()
    written = json.dumps(saved)
    state.advance(sequences=2, tokens=100, fingerprint=5)
    remember(config, state, 0.5, 1.5, None)
    remember(config, state, 9.0, 9.0, "a spike")
    assert json.dumps(saved) == written
    assert (state.recent_losses, state.recent_norms, state.skipped) == ([1.0, 0.5], [2.0, 1.5], 1)


def test_a_step_advances_all_of_it() -> None:
    state = TrainState()
    state.advance(sequences=2, tokens=100, fingerprint=5)
    state.advance(sequences=2, tokens=90, fingerprint=6)
    assert state == TrainState(step=2, sequences=4, tokens=190, stream=stream_hash(stream_hash("", 5), 6))


def test_a_cut_state_is_refused_and_changes_nothing() -> None:
    state = TrainState(step=7)
    with pytest.raises(KeyError, match="tokens"):
        state.load_state_dict({"step": 3, "sequences": 12})
    assert state == TrainState(step=7)


def test_the_hash_of_a_stream_depends_on_the_order_of_steps() -> None:
    assert stream_hash(stream_hash("", 1), 2) != stream_hash(stream_hash("", 2), 1)
    assert len({stream_hash("", 1), stream_hash("", 2), stream_hash("a", 1)}) == 3

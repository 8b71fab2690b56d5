"""The configurations in a run's folder over several resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.metrics import record_config
from farspan.trainer.toml_config import load_config
from tests.support import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(Path("tokens"), tmp_path, ParallelConfig(), steps=4)


def steps_by_file(folder: Path) -> dict[str, int]:
    return {path.name: load_config(Config, path).train.steps for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        (
            ((4, 0), (5, 2), (5, 3), (6, 4)),
            {"config_until_step_2.toml": 4, "config_until_step_4.toml": 5, "config.toml": 6},
        ),
        # 5 steps led to no checkpoint.
        (((3, 0), (4, 0), (5, 2), (6, 2)), {"config_until_step_2.toml": 4, "config.toml": 6}),
    ],
)
def test_each_configuration_is_kept_with_the_step_it_led_to(
    config: Config, tmp_path: Path, starts: tuple[tuple[int, int], ...], expected: dict[str, int]
) -> None:
    for steps, resumed_at in starts:
        record_config(tmp_path, replace(config, train=replace(config.train, steps=steps)), resumed_at)
    assert steps_by_file(tmp_path) == expected


def test_equal_paths_are_no_change(config: Config, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    record_config(tmp_path, config, 0)
    record_config(tmp_path, replace(config, data=replace(config.data, folder=Path("./tokens/"))), 2)
    assert list(steps_by_file(tmp_path)) == ["config.toml"]
    assert log.text == ""


def test_options_of_one_side_are_named(config: Config, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    record_config(tmp_path, config, 0)
    record_config(tmp_path, replace(config, attention=replace(config.attention, options={"causal": True})), 2)
    assert "changed     attention.options.causal unset -> True; see " in log.text


def test_a_file_that_cannot_be_read_is_kept(config: Config, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.toml").write_text("[run\n")
    record_config(tmp_path, config, 2)
    assert (tmp_path / "config_until_step_2.toml").read_text() == "[run\n"
    assert load_config(Config, tmp_path / "config.toml") == config
    assert "cannot read: " in log.text


def with_schedule(config: Config, steps: int, **optimizer: Any) -> Config:
    return replace(config, train=replace(config.train, steps=steps), optimizer=replace(config.optimizer, **optimizer))


# Cosine from 0.01 to 0.001 over 10 steps without warm-up: cos(pi 6/10) = -0.309, cos(pi 5/10) = 0.
@pytest.mark.parametrize(
    ("step", "changes", "expected"),
    [
        # cos(pi 6/20) = 0.588.
        (6, {"steps": 20}, "step 7 is 0.008145 instead of 0.004109, after 0.0055 in step 6"),
        # The end of the schedule; cos(pi 9/10) = -0.951, cos(pi 10/20) = 0.
        (10, {"steps": 20}, "step 11 is 0.0055 instead of 0.001, after 0.00122 in step 10"),
        (6, {"warmup_steps": 8}, "step 7 is 0.00875 instead of 0.004109, after 0.0055 in step 6"),
        (6, {"learning_rate": 0.02}, "step 7 is 0.008219 instead of 0.004109, after 0.0055 in step 6"),
        (6, {"final_fraction": 0.0}, "step 7 is 0.003455 instead of 0.004109, after 0.0055 in step 6"),
        (6, {"schedule": "wsd"}, "step 7 is 0.01 instead of 0.004109, after 0.0055 in step 6"),
        (6, {"schedule": "wsd", "decay_fraction": 0.5}, "step 7 is 0.0082 instead of 0.004109, after 0.0055 in step 6"),
        (6, {"beta2": 0.99}, None),
        (6, {"schedule": "cosine", "decay_fraction": 0.5}, None),
    ],
)
def test_a_jump_of_the_learning_rate_is_said(
    config: Config, tmp_path: Path, log: pytest.LogCaptureFixture, step: int, changes: dict[str, Any], expected: str
) -> None:
    base = with_schedule(config, 10, learning_rate=0.01, warmup_steps=0)
    changed = with_schedule(base, **{"steps": 10, **changes})
    record_config(tmp_path, base, 0)
    # The second attempt goes on from the same checkpoint, since the first reached no other.
    for _ in range(2):
        log.clear()
        record_config(tmp_path, changed, step)
        if expected is None:
            assert "learning rate of" not in log.text
        else:
            assert f"so that the learning rate of {expected}; see " in log.text
    log.clear()
    record_config(tmp_path, base, step)
    assert log.text == ""
    assert load_config(Config, tmp_path / "config.toml") == base


def test_an_interrupted_replacement_is_finished(config: Config, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    record_config(tmp_path, config, 0)
    (tmp_path / "config.toml").rename(tmp_path / "config_until_step_2.toml")
    record_config(tmp_path, replace(config, train=replace(config.train, steps=5)), 2)
    assert "changed     train.steps 4 -> 5" in log.text
    assert steps_by_file(tmp_path) == {"config_until_step_2.toml": 4, "config.toml": 5}

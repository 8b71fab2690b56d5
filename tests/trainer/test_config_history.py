"""The configurations in a run's folder over several resumes."""

from dataclasses import replace
from pathlib import Path

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

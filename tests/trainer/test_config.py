from pathlib import Path

import pytest
import torch

from farspan.kernels.errors import ConfigError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, TrainConfig, flat
from farspan.trainer.config_io import load_config
from tests.trainer import tiny


def test_flat_names_every_setting_once() -> None:
    config = tiny.config(Path("tokens"), Path("run"), ParallelConfig(context=4))
    found = flat(config)
    assert found["run.folder"] == "run"
    assert found["model.rope.base"] == 10_000.0
    assert found["parallel.context"] == 4
    assert not any(isinstance(value, dict) for value in found.values())
    # Ten sections' worth: nothing is lost when two sections share a name, such as every_steps.
    assert (found["checkpoint.every_steps"], found["evaluate.every_steps"]) == (100, 100)


def test_options_build_the_mechanism() -> None:
    assert str(AttentionConfig(options={"causal": False}).build_mechanism()) == "Dense(causal=False)"
    with pytest.raises(ConfigError, match=r"attention mechanism 'dence' does not exist; .* Did you mean 'dense'\?"):
        AttentionConfig(mechanism="dence").build_mechanism()


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_dtype(name) -> None:
    assert TrainConfig(steps=1, compute_dtype=name).torch_dtype == getattr(torch, name)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml")), ids=str)
def test_every_preset_loads(path: Path) -> None:
    from farspan.trainer.config import Config

    assert load_config(Config, path).run.folder == Path("runs") / path.stem

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, TrainConfig, flat
from farspan.trainer.toml_config import load_config
from tests.support import tiny


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
    assert str(AttentionConfig(options={"causal": False}).build_mechanisms(1)[0]) == "Dense(causal=False)"
    with pytest.raises(ConfigError, match=r"attention mechanism 'dence' does not exist; .* Did you mean 'dense'\?"):
        AttentionConfig(mechanism="dence").build_mechanisms(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picky(Masked):
    """Refuses one option at once and another where it says what is visible."""

    blocks: int = 1
    window: int = 1

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(),)

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(window=self.window)


@pytest.mark.parametrize(
    ("option", "cause"),
    [
        ("blocks", "blocks=0 must be at least 1"),
        ("window", "window=0 must be at least 1: a query always sees its own position"),
    ],
)
def test_an_option_that_the_mechanism_refuses(monkeypatch: pytest.MonkeyPatch, option: str, cause: str) -> None:
    monkeypatch.setitem(MECHANISMS._parts, "picky", Picky)
    with pytest.raises(ConfigError) as refused:
        AttentionConfig(mechanism="picky", options={option: 0}).build_mechanisms(1)
    assert str(refused.value) == (
        f"attention.options={{{option} = 0}} does not suit attention.mechanism='picky': {cause}."
    )


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_dtype(name) -> None:
    assert TrainConfig(steps=1, compute_dtype=name).torch_dtype == getattr(torch, name)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml")), ids=str)
def test_every_preset_loads(path: Path) -> None:
    from farspan.trainer.config import Config

    assert load_config(Config, path).run.folder == Path("runs") / path.stem


def test_patterns_of_layers() -> None:
    """A pattern is repeated; layers are told their number; options stand by name."""
    built = AttentionConfig(mechanism="lightning*2, moba", options={"moba": {"block": 8}}).build_mechanisms(5)
    assert built == (
        Lightning(layer=0, layers=5),
        Lightning(layer=1, layers=5),
        MoBA(block=8),
        Lightning(layer=3, layers=5),
        Lightning(layer=4, layers=5),
    )
    fixed = AttentionConfig(mechanism="lightning", options={"layer": 1, "layers": 9}).build_mechanisms(3)
    assert fixed == (Lightning(layer=1, layers=9),) * 3


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        ("lightning*, dense", {}, "must be names with commas between"),
        ("dense,", {}, "must be names with commas between"),
        ("dense*0", {}, "must be names with commas between"),
        ("dense, moba", {"block": 8}, "attention.options.block is for none of attention.mechanism='dense, moba'"),
        ("dense, moba", {"moba": {"blok": 8}}, "attention.options.moba.blok"),
        ("dense, moba", {"moba": {"block": 0}}, "attention.options.moba={block = 0} does not suit"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(mechanism: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as unsupported_reason:
        AttentionConfig(mechanism=mechanism, options=options).build_mechanisms(4)
    assert message in str(unsupported_reason.value)

import functools
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, Config, flat
from farspan.trainer.renamed import current_names, refuse_old_key
from farspan.trainer.toml_config import from_tree, load_config, to_toml
from tests.support import tiny


def test_flat_names_every_setting_once() -> None:
    config = tiny.config(Path("tokens"), Path("run"), ParallelConfig(context=4))
    found = flat(config)
    assert found["run.folder"] == "run"
    assert found["model.rope.base"] == 10_000.0
    assert found["parallel.context"] == 4
    assert not any(isinstance(value, dict) for value in found.values())
    # Nothing is lost when two sections share a name.
    assert (found["checkpoint.every_steps"], found["evaluate.every_steps"]) == (100, 100)


def test_options_build_the_mechanism() -> None:
    assert str(AttentionConfig(options={"causal": False}).build_mechanisms(1)[0]) == "Dense(causal=False)"
    with pytest.raises(ConfigError, match=r"attention mechanism 'dence' does not exist; .* Did you mean 'dense'\?"):
        AttentionConfig(mechanism="dence").build_mechanisms(1)


@pytest.mark.parametrize(("mechanism", "option"), [("mosa", "sparsity"), ("window", "window")])
def test_an_option_that_the_mechanism_refuses(mechanism: str, option: str) -> None:
    """At once, or where it says what is visible."""
    expected = rf"attention\.options={{{option} = 0}} .* attention\.mechanism='{mechanism}': {option}=0 must be at "
    with pytest.raises(ConfigError, match=expected):
        AttentionConfig(mechanism=mechanism, options={option: 0}).build_mechanisms(1)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml")), ids=str)
def test_every_preset_loads(path: Path) -> None:
    """And leaves the strategy to the cost model, whatever ranks it runs on."""
    config = load_config(Config, path)
    assert config.run.folder == Path("runs") / path.stem
    assert config.parallel.strategy == "auto"


def test_patterns_of_layers() -> None:
    """A pattern is repeated; layers get their number; options are by name."""
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
        ("dense, moba", {"block": 8}, "attention.options={}"),
        ("dense", {"block": 8}, "attention.options.block=8 is not a known key; choose one of causal."),
        ("dense", {"block": 8}, "attention.options={}"),
        ("neighborhood", {"window": 8, "grid": [9]}, "attention.options={}"),
        ("vmoba, vmoba, vmoba", {}, "attention.mechanism='vmoba, vmoba, vmoba' repeats itself"),
        ("dense*3", {}, "write 'dense'"),
        ("lightning*2, dense, lightning*2, dense", {}, "write 'lightning, lightning, dense'"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(mechanism: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        AttentionConfig(mechanism=mechanism, options=options).build_mechanisms(4)
    assert message in str(refused.value)


def test_options_of_a_file_are_dropped_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = tiny.config(Path("tokens"), Path("run"), ParallelConfig())
    moba = replace(config, attention=AttentionConfig(mechanism="moba", options={"block": 8}))
    path.write_text(to_toml(moba, brief=True))
    with pytest.raises(ConfigError, match=r"attention\.options={}"):
        load_config(Config, path, ["attention.mechanism=dense"]).mechanisms()
    found = load_config(
        Config, path, ["attention.mechanism=window", "attention.options={}", "attention.options.sinks=3"]
    )
    assert found.mechanisms()[0] == Window(sinks=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("skip.most=3", "skip.most was renamed to skip.max_consecutive_skips."),
        ("skip.sigma=3.0", "skip.sigma was renamed to skip.spike_sigma."),
        ("model.experts.normalised=true", "model.experts.normalised was renamed to model.experts.normalized."),
        ("model.head_mixture.normalised=true", "normalised was renamed to model.head_mixture.normalized."),
        ("attention.mechanism=neighbourhood", "'neighbourhood' was renamed to 'neighborhood'."),
        ("attention.mechanism=neighbourhood*3, dense", "'neighbourhood' was renamed to 'neighborhood'."),
        ("attention.options.neighbourhood.window=[3]", "neighbourhood was renamed to attention.options.neighborhood."),
        ("attention.backend=library", "'library' was renamed to 'cuda'."),
    ],
)
def test_old_names_are_refused_with_the_new_ones(tmp_path: Path, setting: str, message: str) -> None:
    key, value = setting.split("=", 1)
    config = tiny.config(Path("tokens"), Path("run"), ParallelConfig())
    path, tree = tmp_path / "config.toml", tomllib.loads(to_toml(config, brief=True))
    path.write_text(to_toml(config, brief=True))
    with pytest.raises(ConfigError, match=f"{re.escape(message)}$"):
        load_config(Config, path, [setting])
    # The same in the file.
    *sections, name = key.split(".")
    functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[name] = value
    with pytest.raises(ConfigError, match=f"{re.escape(message)}$"):
        from_tree(Config, tree)


def test_settings_of_an_old_checkpoint_have_the_names_of_today() -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_old_key("parallel.rounded_gradients")
    assert str(refused.value) == (
        'parallel.rounded_gradients was renamed to parallel.grad_comm_dtype ("compute" for true, "accumulation" for '
        "false)."
    )
    old = {"model.experts.normalised": True, "model.width": 8}
    assert current_names(old) == {"model.experts.normalized": True, "model.width": 8}

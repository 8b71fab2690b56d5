"""Each rule between fields: the keys and values that its error names, and the nearest settings that it accepts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, RopeConfig
from farspan.trainer.validate import validate
from tests.support import tiny


def changed(config: Config, changes: dict[str, Any]) -> Config:
    for dotted, value in changes.items():
        section, name = dotted.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def check(changes: dict[str, Any], *, num_ranks: int = 4) -> None:
    base = tiny.config(Path("data"), Path("run"), ParallelConfig(context=2))
    config = changed(base, changes)
    validate(config, Degrees.resolve(config.parallel, num_ranks))


def rope(**options: Any) -> dict[str, Any]:
    return {"model.rope": RopeConfig(**options)}


def experts(**options: Any) -> dict[str, Any]:
    return {"model.experts": ExpertsConfig(**{"count": 4, "feed_forward": 16} | options)}


def heads(**options: Any) -> dict[str, Any]:
    return {"model.head_mixture": HeadMixtureConfig(**options)}


def attention(mechanism: str, **options: Any) -> dict[str, Any]:
    return {"attention.mechanism": mechanism, "attention.options": options}


def wsd(warmup: int, decay: float) -> dict[str, Any]:
    return {"optimizer.schedule": "wsd", "optimizer.warmup_steps": warmup, "optimizer.decay_fraction": decay}


GATED = {"model.recurrent_layer": "gated"}
TILES = ["1", "11", "101"]

# What is wrong, fragments of the error, and what is right.
CASES: list[tuple[dict[str, Any], list[str], dict[str, Any]]] = [
    (
        {"model.heads": 12, "model.kv_heads": 5},
        ["model.kv_heads=5", "model.heads=12", "1, 2, 3, 4, 6, 12 do"],
        {"model.heads": 12, "model.kv_heads": 4},
    ),
    ({"model.head_dim": 7}, ["model.head_dim=7", "even"], {"model.head_dim": 6}),
    (rope(rotated=5), ["model.rope.rotated=5", "even", "model.head_dim=8"], rope(rotated=6)),
    (rope(rotated=10), ["model.rope.rotated=10", "at most model.head_dim=8"], rope(rotated=8)),
    (rope(factor=4.0), ["model.rope.factor=4.0", "model.rope.scaling"], rope(factor=4.0, scaling="yarn")),
    (
        rope(scaling="llama3"),
        ["model.rope.scaling='llama3'", "model.rope.factor=1.0"],
        rope(scaling="llama3", factor=1.5),
    ),
    (rope(scaling="yarn"), ["model.rope.scaling='yarn'", "model.rope.factor=1.0"], rope(scaling="yarn", factor=1.5)),
    (
        rope(scaling="llama3", factor=2.0, low_frequency_factor=4.0),
        ["model.rope.low_frequency_factor=4.0", "model.rope.high_frequency_factor=4.0"],
        rope(scaling="llama3", factor=2.0, low_frequency_factor=3.9),
    ),
    (
        rope(scaling="yarn", factor=2.0, beta_slow=32.0),
        ["model.rope.beta_slow=32.0", "model.rope.beta_fast=32.0"],
        rope(scaling="yarn", factor=2.0, beta_slow=31.0),
    ),
    (
        GATED | attention("dense, window"),
        ["model.recurrent_layer='gated'", "attention.mechanism='dense, window'"],
        GATED | attention("dense, lightning"),
    ),
    (
        attention("spans", alpha=[64.0] * 2, beta=[0.0] * 2, length=512),
        ["attention.mechanism='spans'", "2 windows for 4 query heads"],
        attention("spans", alpha=[64.0] * 4, beta=[0.0] * 4, length=512),
    ),
    (
        attention("block_sparse", block=26, mask=TILES),
        ["attention.mechanism='block_sparse'", "mask has 3", "has 4"],
        attention("block_sparse", block=34, mask=TILES),
    ),
    ({"parallel.expert": 2}, ["parallel.expert=2", "model.experts.count=0"], {"parallel.expert": 2} | experts()),
    (
        experts(layers="dense*2, experts"),
        ["model.experts.count=4", "model.experts.layers='dense*2, experts'"],
        experts(layers="dense, experts"),
    ),
    (
        experts(layers="dense, expert"),
        ["model.experts.layers='dense, expert'", "'expert'"],
        experts(layers="dense, experts"),
    ),
    (experts(feed_forward=0), ["model.experts.feed_forward=0"], experts()),
    (experts(per_token=5), ["model.experts", "per_token=5", "experts=4"], experts(per_token=4)),
    (
        {"parallel.expert": 4} | experts(count=6),
        ["parallel.expert=4", "model.experts.count=6"],
        {"parallel.expert": 2} | experts(count=6),
    ),
    (
        experts(choice="experts", normalized=False, capacity=1.5),
        ["model.experts.capacity=1.5", "model.experts.choice='experts'", "set it to 0.0"],
        experts(choice="experts", normalized=False),
    ),
    (
        {"parallel.expert": 2} | experts(feed_forward=15),
        ["model.experts.feed_forward=15", "a multiple of the 2 ranks"],
        {"parallel.expert": 4} | experts(feed_forward=15),
    ),
    (
        heads(kind="experts", count=2, per_token=3),
        ["model.head_mixture", "per_token=3", "count=2"],
        heads(kind="experts", count=3, per_token=3),
    ),
    (
        heads(kind="experts", count=3, per_token=2, own_keys=True),
        ["model.head_mixture.own_keys=true", "per_token=3"],
        heads(kind="experts", count=3, per_token=3, own_keys=True),
    ),
    (
        heads(kind="heads", count=1),
        ["model.head_mixture.count=1", "model.head_mixture.kind='heads'", "set it to 0"],
        heads(kind="heads"),
    ),
    (
        heads(kind="heads", normalized=False),
        ["model.head_mixture.normalized=false", "model.head_mixture.kind='heads'", "set it to true"],
        heads(kind="experts", count=2, normalized=False),
    ),
    (
        heads(kind="experts", count=2, shared=1),
        ["model.head_mixture.shared=1", "model.head_mixture.kind='experts'", "set it to 0"],
        heads(kind="heads", shared=1),
    ),
    (
        GATED | heads(kind="experts", count=3) | attention("lightning"),
        ["model.head_mixture.kind='experts'", "attention.mechanism='lightning'", "model.recurrent_layer='gated'"],
        GATED | heads(kind="experts", count=3) | attention("lightning, dense"),
    ),
    (
        heads(kind="experts", count=3, per_token=2) | attention("lightning"),
        ["attention.mechanism='lightning'", "by their number", "model.head_mixture.kind='none'"],
        heads(kind="experts", count=3, per_token=3) | attention("lightning"),
    ),
    (
        {"optimizer.warmup_steps": 11},
        ["optimizer.warmup_steps=11", "train.steps=10", "optimizer.warmup_steps=10 or less"],
        {"optimizer.warmup_steps": 10},
    ),
    (
        wsd(11, 0.4),
        ["optimizer.warmup_steps=11", "train.steps=10", "optimizer.warmup_steps=6 or less"],
        wsd(6, 0.4),
    ),
    (wsd(11, 1.0), ["optimizer.warmup_steps=11", "train.steps=10", "set optimizer.warmup_steps=0."], wsd(0, 1.0)),
    (
        wsd(7, 0.4),
        [
            "optimizer.warmup_steps=7",
            "last 4 steps",
            "optimizer.decay_fraction=0.4",
            "optimizer.warmup_steps=6 or less",
        ],
        wsd(6, 0.4),
    ),
    (
        {"train.sequences_per_step": 3},
        ["train.sequences_per_step=3", "the 2 data-parallel groups", "4 is"],
        {"train.sequences_per_step": 4},
    ),
    (
        {"parallel.layout": "zigzak"},
        ["parallel.layout='zigzak'", "balanced, contiguous, striped, zigzag", "Did you mean 'zigzag'?"],
        {"parallel.layout": "striped"},
    ),
    (
        {"parallel.strategy": "single"},
        ["parallel.strategy='single'", "set parallel.context=1 instead of 2"],
        {"parallel.strategy": "single", "parallel.context": 1, "train.sequences_per_step": 4},
    ),
]


@pytest.mark.parametrize(("wrong", "fragments", "right"), CASES, ids=[fragments[0] for _, fragments, _ in CASES])
def test_rule(wrong: dict[str, Any], fragments: list[str], right: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(wrong)
    assert [fragment for fragment in fragments if fragment not in str(refused.value)] == []
    check(right)


def test_one_golden_sentence() -> None:
    with pytest.raises(ConfigError) as refused:
        check({"train.sequences_per_step": 3})
    assert str(refused.value) == (
        "train.sequences_per_step=3 must be a multiple of the 2 data-parallel groups (dp_replicate x dp_shard); 4 is."
    )


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"strategy 'rings' does not exist; .* Did you mean 'ring'\?"):
        check({"parallel.strategy": "rings"})
    with pytest.raises(ConfigError, match=r"attention\.options\.casual=true is not a known key"):
        check({"attention.options": {"casual": True}})

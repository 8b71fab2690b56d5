"""Each rule between fields: the sentence that it says, and the neighboring value that it accepts."""

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


CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "heads share KV heads": (
        {"model.heads": 12, "model.kv_heads": 5},
        "model.kv_heads=5 must divide model.heads=12: 1, 2, 3, 4, 6, 12 do.",
        {"model.heads": 12, "model.kv_heads": 4},
    ),
    "head_dim is even": (
        {"model.head_dim": 7},
        "model.head_dim=7 must be even: rotary embedding turns pairs.",
        {"model.head_dim": 6},
    ),
    "what rotates is even": (
        {"model.rope": RopeConfig(rotated=5)},
        "model.rope.rotated=5 must be even and at most model.head_dim=8: rotary embedding turns pairs of a head's "
        "numbers. 0 turns all.",
        {"model.rope": RopeConfig(rotated=6)},
    ),
    "what rotates is in the head": (
        {"model.rope": RopeConfig(rotated=10)},
        "model.rope.rotated=10 must be even and at most model.head_dim=8: rotary embedding turns pairs of a head's "
        "numbers. 0 turns all.",
        {"model.rope": RopeConfig(rotated=8)},
    ),
    "gates are around a recurrence": (
        {"model.recurrent_layer": "gated", "attention.mechanism": "dense, window"},
        "model.recurrent_layer='gated' is in no layer: attention.mechanism='dense, window' has no recurrence, such as "
        "lightning. Add one, or set model.recurrent_layer=plain.",
        {"model.recurrent_layer": "gated", "attention.mechanism": "dense, lightning"},
    ),
    "windows are for the model's heads": (
        {"attention.mechanism": "spans", "attention.options": {"alpha": [64.0] * 2, "beta": [0.0] * 2, "length": 512}},
        "attention.mechanism='spans' refuses this run: 2 windows for 4 query heads: give one per head, or one for all.",
        {"attention.mechanism": "spans", "attention.options": {"alpha": [64.0] * 4, "beta": [0.0] * 4, "length": 512}},
    ),
    "a mask is for the longest document": (
        {"attention.mechanism": "block_sparse", "attention.options": {"block": 26, "mask": ["1", "11", "101"]}},
        "attention.mechanism='block_sparse' refuses this run: mask has 3 tiles, but a document has 4: give a row for "
        "each.",
        {"attention.mechanism": "block_sparse", "attention.options": {"block": 34, "mask": ["1", "11", "101"]}},
    ),
    "experts are dealt where there are some": (
        {"parallel.expert": 2},
        "parallel.expert=2 deals experts, but model.experts.count=0: set one.",
        {"parallel.expert": 2, "model.experts": ExpertsConfig(count=4, feed_forward=16)},
    ),
    "some layer has the experts": (
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, layers="dense*2, experts")},
        "no layer has the experts of model.experts.count=4: change model.experts.layers='dense*2, experts', or set "
        "model.experts.count=0.",
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, layers="dense, experts")},
    ),
    "layers are experts or dense": (
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, layers="dense, expert")},
        "model.experts.layers='dense, expert' has 'expert': layers are experts or dense.",
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, layers="experts")},
    ),
    "experts have a size": (
        {"model.experts": ExpertsConfig(count=4)},
        "model.experts.feed_forward=0 leaves experts without a size: set it.",
        {"model.experts": ExpertsConfig(count=4, feed_forward=16)},
    ),
    "a token chooses among the experts": (
        {"model.experts": ExpertsConfig(count=4, per_token=5, feed_forward=16)},
        "model.experts does not fit together: per_token=5 must be from 1 to experts=4.",
        {"model.experts": ExpertsConfig(count=4, per_token=4, feed_forward=16)},
    ),
    "experts divide by the ranks": (
        {"parallel.expert": 4, "model.experts": ExpertsConfig(count=6, feed_forward=16)},
        "parallel.expert=4 must divide model.experts.count=6: change one of them.",
        {"parallel.expert": 2, "model.experts": ExpertsConfig(count=6, feed_forward=16)},
    ),
    "where experts choose tokens do not": (
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, choice="experts", normalized=False, capacity=1.5)},
        "model.experts.capacity=1.5 is for tokens that choose, but model.experts.choice='experts': set it to 0.0, or "
        "choice='tokens'.",
        {"model.experts": ExpertsConfig(count=4, feed_forward=16, choice="experts", normalized=False)},
    ),
    "matrices of experts divide by those that hold them": (
        {"parallel.expert": 2, "model.experts": ExpertsConfig(count=4, feed_forward=15)},
        "model.experts.feed_forward=15 must be a multiple of the 2 ranks that hold the same experts (dp_shard x context"
        " / expert): raise parallel.expert, or change it.",
        {"parallel.expert": 4, "model.experts": ExpertsConfig(count=4, feed_forward=15)},
    ),
    "experts of attention are enough": (
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=2, per_token=3)},
        "model.head_mixture does not fit together: per_token=3 must be from 1 to count=2.",
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=3)},
    ),
    "keys of their own are there for all": (
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=2, own_keys=True)},
        "model.head_mixture.own_keys=true is for kind='experts' and tokens that choose all of them: set kind and "
        "per_token=3, or own_keys=false.",
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=3, own_keys=True)},
    ),
    "experts are counted where there are some": (
        {"model.head_mixture": HeadMixtureConfig(kind="heads", count=1)},
        "model.head_mixture.count=1 is for kind='experts', but model.head_mixture.kind='heads': set it to 0, or "
        "change kind.",
        {"model.head_mixture": HeadMixtureConfig(kind="heads")},
    ),
    "weights of heads add up as they do": (
        {"model.head_mixture": HeadMixtureConfig(kind="heads", normalized=False)},
        "model.head_mixture.normalized=false is for kind='experts', but model.head_mixture.kind='heads': set it to "
        "true, or change kind.",
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=2, normalized=False)},
    ),
    "heads are shared, not experts": (
        {"model.head_mixture": HeadMixtureConfig(kind="experts", count=2, shared=1)},
        "model.head_mixture.shared=1 is for kind='heads', but model.head_mixture.kind='experts': set it to 0, or "
        "change kind.",
        {"model.head_mixture": HeadMixtureConfig(kind="heads", shared=1)},
    ),
    "heads mix in some layer": (
        {
            "model.head_mixture": HeadMixtureConfig(kind="experts", count=3),
            "model.recurrent_layer": "gated",
            "attention.mechanism": "lightning",
        },
        "model.head_mixture.kind='experts' is in no layer: attention.mechanism='lightning' with "
        "model.recurrent_layer='gated' has gated ones only. Add another mechanism, or set "
        "model.head_mixture.kind='none'.",
        {
            "model.head_mixture": HeadMixtureConfig(kind="experts", count=3),
            "model.recurrent_layer": "gated",
            "attention.mechanism": "lightning, dense",
        },
    ),
    "chosen heads are alike": (
        {
            "model.head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=2),
            "attention.mechanism": "lightning",
        },
        "attention.mechanism='lightning' treats query heads differently by their number, which heads that tokens "
        "choose do not keep: set model.head_mixture.kind='none', or choose another mechanism.",
        {
            "model.head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=3),
            "attention.mechanism": "lightning",
        },
    ),
    "a factor needs a scaling": (
        {"model.rope": RopeConfig(factor=4.0)},
        "model.rope.factor=4.0 needs model.rope.scaling: set it to llama3 or yarn.",
        {"model.rope": RopeConfig(factor=4.0, scaling="yarn")},
    ),
    "llama3 needs a factor": (
        {"model.rope": RopeConfig(scaling="llama3")},
        "model.rope.scaling='llama3' does nothing with model.rope.factor=1.0: set model.rope.factor to how many times "
        "longer than model.rope.original_positions the context is.",
        {"model.rope": RopeConfig(scaling="llama3", factor=1.5)},
    ),
    "yarn needs a factor": (
        {"model.rope": RopeConfig(scaling="yarn", factor=1.0)},
        "model.rope.scaling='yarn' does nothing with model.rope.factor=1.0: set model.rope.factor to how many times "
        "longer than model.rope.original_positions the context is.",
        {"model.rope": RopeConfig(scaling="yarn", factor=1.5)},
    ),
    "llama3's frequencies are in order": (
        {"model.rope": RopeConfig(scaling="llama3", factor=2.0, low_frequency_factor=4.0)},
        "model.rope.low_frequency_factor=4.0 must be below model.rope.high_frequency_factor=4.0.",
        {"model.rope": RopeConfig(scaling="llama3", factor=2.0, low_frequency_factor=3.9)},
    ),
    "yarn's betas are in order": (
        {"model.rope": RopeConfig(scaling="yarn", factor=2.0, beta_slow=32.0)},
        "model.rope.beta_slow=32.0 must be below model.rope.beta_fast=32.0.",
        {"model.rope": RopeConfig(scaling="yarn", factor=2.0, beta_slow=31.0)},
    ),
    "the warm-up ends": (
        {"optimizer.warmup_steps": 11},
        "optimizer.warmup_steps=11 exceeds train.steps=10: the peak learning rate would never be reached; set "
        "optimizer.warmup_steps=10 or less.",
        {"optimizer.warmup_steps": 10},
    ),
    "the warm-up ends before the decay": (
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 11, "optimizer.decay_fraction": 0.4},
        "optimizer.warmup_steps=11 exceeds train.steps=10: the peak learning rate would never be reached; set "
        "optimizer.warmup_steps=6 or less.",
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 6, "optimizer.decay_fraction": 0.4},
    ),
    "the decay leaves no warm-up": (
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 11, "optimizer.decay_fraction": 1.0},
        "optimizer.warmup_steps=11 exceeds train.steps=10: the peak learning rate would never be reached; set "
        "optimizer.warmup_steps=0.",
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 0, "optimizer.decay_fraction": 1.0},
    ),
    "the decay follows the warm-up": (
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 7, "optimizer.decay_fraction": 0.4},
        "optimizer.warmup_steps=7 and a decay over the last 4 steps (optimizer.decay_fraction=0.4) overlap in "
        "train.steps=10: set optimizer.warmup_steps=6 or less, or lower optimizer.decay_fraction.",
        {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 6, "optimizer.decay_fraction": 0.4},
    ),
    "groups share the batch": (
        {"train.sequences_per_step": 3},
        "train.sequences_per_step=3 must be a multiple of the 2 data-parallel groups (dp_replicate x dp_shard); 4 is.",
        {"train.sequences_per_step": 4},
    ),
    "the layout exists": (
        {"parallel.layout": "zigzak"},
        "parallel.layout='zigzak' does not exist; choose one of balanced, contiguous, striped, zigzag. "
        "Did you mean 'zigzag'?",
        {"parallel.layout": "striped"},
    ),
    "the strategy takes it": (
        {"parallel.strategy": "single"},
        "parallel.strategy='single' refuses this run: strategy 'single' keeps the sequence on one rank: set "
        "parallel.context=1 instead of 2.",
        {"parallel.strategy": "single", "parallel.context": 1, "train.sequences_per_step": 4},
    ),
}


@pytest.mark.parametrize("rule", list(CASES))
def test_rule(rule: str) -> None:
    wrong, message, right = CASES[rule]
    with pytest.raises(ConfigError) as refused:
        check(wrong)
    assert str(refused.value) == message
    check(right)


def test_a_strategy_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"strategy 'rings' does not exist; .* Did you mean 'ring'\?"):
        check({"parallel.strategy": "rings"})


def test_an_option_that_the_mechanism_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"attention\.options\.casual=true is not a known key"):
        check({"attention.options": {"casual": True}})

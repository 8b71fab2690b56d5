"""Five training steps of models whose tokens choose heads: the same on any number of ranks as in one process.

The truth computes every head for every token, with weight 0 where it was not chosen.
"""

from dataclasses import replace
from functools import partial

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import assert_same, two_steps
from tests.trainer.conftest import TrainAndCompare

EXPERTS = ExpertsConfig(count=4, per_token=2, feed_forward=16, shared=8, score="sigmoid", bias_rate=0.01)
# Heads of the tiny model are 4 on 2 KV heads; of experts, so many each.
experts = partial(HeadMixtureConfig, kind="experts")
MIXTURES = {
    "experts of attention": {"head_mixture": experts(count=5, per_token=2, balance_loss=0.02, z_loss=0.01)},
    "not normalized, single heads, biases": {
        "head_mixture": experts(count=4, per_token=2, normalized=False, bias_rate=0.02), "heads": 1, "kv_heads": 1,
    },
    "all experts, in parallel with experts of SwiGLU": {
        "head_mixture": experts(count=3, per_token=3), "experts": EXPERTS, "parallel_blocks": True,
    },
    "with keys of their own, in parallel with SwiGLU": {
        "head_mixture": experts(count=2, per_token=2, own_keys=True, normalized=False),
        "parallel_blocks": True, "key_convolution": 3,
    },
    "heads": {
        "head_mixture": HeadMixtureConfig(
            kind="heads", shared=1, per_token=2, balance_loss=0.05, balance_over="step", bias_rate=0.01, z_loss=0.03
        ),
        "heads": 8, "head_dim": 4,
    },
    "heads, none shared, one KV head, beside experts": {
        "head_mixture": HeadMixtureConfig(kind="heads", per_token=2, z_loss=0.02), "experts": EXPERTS, "kv_heads": 1,
    },
}  # fmt: skip
SHARDED = {
    "ring": ParallelConfig(context=2, strategy="ring"),
    "ulysses": ParallelConfig(context=2, dp_shard=2, strategy="ulysses"),
    "fetch, striped": ParallelConfig(context=4, strategy="fetch", layout="striped"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_steps_do_not_depend_on_the_ranks(base: Config, train_and_compare: TrainAndCompare, mixture: str) -> None:
    """Each mixture on one rank and under one strategy, in turns; with recomputation on four ranks."""
    config = tiny.with_model(base, **MIXTURES[mixture])
    train_and_compare(config)
    parallel = list(SHARDED.values())[list(MIXTURES).index(mixture) % len(SHARDED)]
    if config.model.experts.count:
        parallel = replace(parallel, expert=parallel.context)
    recompute = "block" if parallel.context == 4 else "none"
    train_and_compare(replace(config, parallel=parallel, train=replace(config.train, recompute=recompute)))


MECHANISMS = {"moba": {"block": 8, "top_k": 3}, "mosa": {"sparsity": 4}, "nats": {}, "window": {"window": 16}}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_any_mechanism_attends_with_chosen_heads(base: Config, ranks: Pools, mechanism: str) -> None:
    attention = AttentionConfig(mechanism=mechanism, options=MECHANISMS[mechanism], backend="cpu")
    configs = [
        replace(tiny.with_model(base, **MIXTURES[mixture]), attention=attention)
        for mixture in ("experts of attention", "heads")
    ]
    single = ranks(1).run(two_steps, configs)[0]
    for strategy in ("ring", "ulysses"):
        sharded = [replace(config, parallel=ParallelConfig(context=2, strategy=strategy)) for config in configs]
        for found, expected in zip(ranks(2).run(two_steps, sharded)[1], single, strict=True):
            assert all(gradient.abs().max() > 0 for gradient in expected.gradients[0].values())
            assert_same(found, expected)


def test_head_mixtures_beside_gated_recurrences(base: Config, train_and_compare: TrainAndCompare) -> None:
    """Layers of both kinds, with and without key convolution."""
    config = tiny.with_model(base, **MIXTURES["experts of attention"], recurrent_layer="gated", key_convolution=3)
    config = replace(config, attention=AttentionConfig(mechanism="lightning, dense", backend="cpu"))
    gradients = train_and_compare(replace(config, parallel=ParallelConfig(context=2)))[0].gradients[0]
    routers = [name for name in gradients if name.endswith("head_router.weight")]
    assert routers == ["blocks.1.attention.head_router.weight"]

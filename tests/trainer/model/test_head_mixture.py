"""Ten training steps of models whose tokens choose heads: the same on any number of ranks as in one process.

The truth computes every head for every token, with weight 0 where it was not chosen.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import (
    Trajectory,
    assert_same,
    initial_parameters,
    train_reference,
    train_sharded,
)

EXPERTS = ExpertsConfig(count=4, per_token=2, feed_forward=16, shared=8, score="sigmoid", bias_rate=0.01)
# Heads of the tiny model are 4 on 2 KV heads; of experts, so many each.
MIXTURES = {
    "experts of attention": {
        "head_mixture": HeadMixtureConfig(kind="experts", count=5, per_token=2, balance_loss=0.02, z_loss=0.01),
    },
    "not normalized, single heads, biases": {
        "head_mixture": HeadMixtureConfig(kind="experts", count=4, per_token=2, normalized=False, bias_rate=0.02),
        "heads": 1, "kv_heads": 1,
    },
    "all experts, in parallel with experts of SwiGLU": {
        "head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=3), "experts": EXPERTS,
        "parallel_blocks": True,
    },
    "with keys of their own, in parallel with SwiGLU": {
        "head_mixture": HeadMixtureConfig(kind="experts", count=2, per_token=2, own_keys=True, normalized=False),
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("heads")
    return tiny.config(tiny.make_data(folder), folder / "run", ParallelConfig(strategy="single"))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_ten_steps_do_not_depend_on_the_ranks(base: Config, ranks: Pools, mixture: str) -> None:
    """Each mixture on one rank and under one strategy, in turns; with recomputation on four ranks."""
    config = tiny.with_model(base, **MIXTURES[mixture])
    start = ranks(1).run(initial_parameters, config)[0]
    parallel = list(SHARDED.values())[list(MIXTURES).index(mixture) % len(SHARDED)]
    if config.model.experts.count:
        parallel = replace(parallel, expert=parallel.context)
    recompute = "block" if parallel.context == 4 else "none"
    sharded = replace(config, parallel=parallel, train=replace(config.train, recompute=recompute))
    data = max(parallel.dp_shard, 1)
    for run, together in ((config, 1), (sharded, data)):
        courses = ranks(run.parallel.context * max(run.parallel.dp_shard, 1)).run(train_sharded, run)
        assert_same(courses[-1], train_reference(config, start, together))


MECHANISMS = {
    "moba": {"block": 8, "top_k": 3},
    "mosa": {"sparsity": 4},
    "nats": {},
    "window": {"window": 16},
}


def train_all(configs: list[Config]) -> list[Trajectory]:
    """On each rank: two steps of every run."""
    return [train_sharded(config, 2) for config in configs]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_any_mechanism_attends_with_chosen_heads(base: Config, ranks: Pools, mechanism: str) -> None:
    attention = AttentionConfig(mechanism=mechanism, options=MECHANISMS[mechanism], backend="cpu")
    configs = [
        replace(tiny.with_model(base, **MIXTURES[mixture]), attention=attention)
        for mixture in ("experts of attention", "heads")
    ]
    single = ranks(1).run(train_all, configs)[0]
    for strategy in ("ring", "ulysses"):
        sharded = [replace(config, parallel=ParallelConfig(context=2, strategy=strategy)) for config in configs]
        for found, expected in zip(ranks(2).run(train_all, sharded)[1], single, strict=True):
            assert all(gradient.abs().max() > 0 for gradient in expected.gradients[0].values())
            assert_same(found, expected)


def test_head_mixtures_beside_gated_recurrences(base: Config, ranks: Pools) -> None:
    """Layers of both kinds, with and without key convolution."""
    config = tiny.with_model(base, **MIXTURES["experts of attention"], recurrent_layer="gated", key_convolution=3)
    config = replace(config, attention=AttentionConfig(mechanism="lightning, dense", backend="cpu"))
    start = ranks(1).run(initial_parameters, config)[0]
    assert [name for name in start if name.endswith("head_router.weight")] == ["blocks.1.attention.head_router.weight"]
    sharded = replace(config, parallel=ParallelConfig(context=2, strategy="ring"))
    assert_same(ranks(2).run(train_sharded, sharded)[-1], train_reference(config, start, 1))

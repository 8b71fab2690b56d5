"""Five training steps: losses and all parameters' gradients are the same however tokens and parameters are sharded.

The truth is a decoder written a second time from its formulas, see `decoder.py`.
"""

from dataclasses import replace

import pytest
import torch

from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import train_sharded
from tests.trainer.conftest import TrainAndCompare, Truth


@pytest.mark.parametrize(
    ("context", "data", "strategy"),
    [
        (1, 1, "ring"), (1, 2, "ulysses"), (2, 1, "ulysses"), (2, 1, "ring"), (2, 2, "ring"), (4, 1, "ring"),
        (4, 1, "ulysses"), (4, 2, "ulysses"),
    ],
)  # fmt: skip
def test_steps_do_not_depend_on_the_ranks(
    base: Config, train_and_compare: TrainAndCompare, context: int, data: int, strategy: str
) -> None:
    parallel = ParallelConfig(context=context, dp_shard=data, strategy=strategy)
    trajectories = train_and_compare(replace(base, parallel=parallel))
    assert len(set(trajectories[0].losses)) == base.train.steps


@pytest.mark.parametrize("strategy", ["gather", "fetch", "double_ring", "hybrid", "hybrid_outer"])
def test_steps_do_not_depend_on_the_strategy(base: Config, train_and_compare: TrainAndCompare, strategy: str) -> None:
    inner = 2 if STRATEGIES.get(strategy).unsupported_reason(Dense(), base.model.heads_of(Dense()), 4, 1) else 1
    parallel = ParallelConfig(context=4, context_inner=inner, strategy=strategy, layout="balanced")
    train_and_compare(replace(base, parallel=parallel))


FOUR = ParallelConfig(context=4)
# By name: ranks, and settings of training and of the model.
VARIANTS = {
    "replicas": (ParallelConfig(context=2, dp_replicate=2), {}, {}),
    "striped": (ParallelConfig(context=4, layout="striped"), {}, {}),
    "recompute": (FOUR, {"recompute": "block"}, {}),
    "key convolution": (FOUR, {}, {"key_convolution": 3}),
    "biases": (FOUR, {}, {"qkv_bias": True}),
    "tied, no qk norm, MQA": (FOUR, {}, {"tied_embeddings": True, "qk_norm": False, "kv_heads": 1}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_run(base: Config, train_and_compare: TrainAndCompare, variant: str) -> None:
    parallel, training, model = VARIANTS[variant]
    train_and_compare(replace(tiny.with_model(base, **model), parallel=parallel, train=replace(base.train, **training)))


def test_bfloat16_compute_follows_float64_with_float32_masters(base: Config, truth: Truth, ranks: Pools) -> None:
    """Eight bits of mantissa: losses within 1 %, while parameters and gradients stay float32."""
    config = replace(base, parallel=ParallelConfig(context=2), train=replace(base.train, compute_dtype="bfloat16"))
    trajectory = ranks(2).run(train_sharded, config)[0]
    assert trajectory.losses == pytest.approx(truth(config).losses, rel=1e-2)
    assert trajectory.losses != truth(config).losses
    assert {gradient.dtype for gradient in trajectory.gradients[-1].values()} == {torch.float32}

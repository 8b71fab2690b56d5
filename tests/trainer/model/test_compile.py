"""`train.compile`: compiled blocks train as others do, under FSDP2, recomputation and a ring."""

from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch._dynamo.utils import counters

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.model.config import ExpertsConfig
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import Trajectory, assert_same, train_sharded

COMPILE = partial(torch.compile, backend="aot_eager")
"""All of torch.compile but the generation of code, which takes a C++ compiler and minutes."""


def train_compiled(config: Config) -> tuple[Trajectory, Trajectory, int]:
    """On each rank: the run as it is, the run compiled, and how many graphs there were."""
    plain = train_sharded(config)
    counters.clear()
    with mock.patch.object(torch, "compile", COMPILE):
        compiled = train_sharded(replace(config, train=replace(config.train, compile=True)))
    return plain, compiled, counters["stats"]["unique_graphs"]


def test_compiled_blocks_train_as_others_do(base: Config, ranks: Pools) -> None:
    """Two layers with experts, which stay outside of graphs, and two without."""
    experts = ExpertsConfig(count=4, feed_forward=16, layers="experts, dense", balance_loss=0.01)
    config = replace(
        tiny.with_model(base, layers=4, experts=experts, key_convolution=3),
        parallel=ParallelConfig(context=2, strategy="ring"),
        train=replace(base.train, steps=2, recompute="block"),
    )
    for plain, compiled, graphs in ranks(2).run(train_compiled, config):
        assert_same(compiled, plain)
        # Equal blocks share graphs, and no step makes new ones: norm and projections, rotation, the output matrix; then
        # sum, norm and SwiGLU, or what comes before and after experts.
        assert 0 < graphs <= 9

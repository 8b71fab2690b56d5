"""Every mechanism trains: losses and gradients of two steps do not depend on the ranks or the strategy."""

from dataclasses import asdict, replace

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.validate import validate
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import Trajectory, assert_same, train_sharded, two_steps

SHARDED = [
    ParallelConfig(context=2, strategy="ring", layout="zigzag"),
    ParallelConfig(context=2, strategy="ring", layout="striped"),
    ParallelConfig(context=2, strategy="ulysses"),
    ParallelConfig(context=2, strategy="fetch", layout="contiguous"),
]


@pytest.fixture(scope="module")
def base(base: Config) -> Config:
    """Eight query heads, which the mechanisms' examples are for."""
    return tiny.with_model(base, heads=8, head_dim=4)


def using(base: Config, mechanism: Mechanism, name: str) -> Config:
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(mechanism).items()}  # pyright: ignore
    return replace(base, attention=AttentionConfig(mechanism=name, options=options, backend="cpu"))


def is_valid(config: Config) -> bool:
    try:
        validate(config, Degrees.resolve(config.parallel, config.parallel.context))
    except ConfigError:
        return False
    return True


def example(base: Config, name: str) -> Config:
    """Return a run with the first example of a mechanism that goes with the model."""
    return next(config for one in MECHANISMS.get(name).examples() if is_valid(config := using(base, one, name)))


def compare_on_two_ranks(ranks: Pools, config: Config, sharded: list[Config]) -> Trajectory:
    """Return two steps of a run in one process, which those on two ranks equal."""
    (single,) = ranks(1).run(two_steps, [config])[0]
    for of_rank in ranks(2).run(two_steps, sharded):
        for trajectory in of_rank:
            assert_same(trajectory, single)
    return single


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_two_steps_do_not_depend_on_the_ranks(base: Config, ranks: Pools, name: str) -> None:
    config = example(base, name)
    sharded = [run for parallel in SHARDED if is_valid(run := replace(config, parallel=parallel))]
    assert sharded
    single = compare_on_two_ranks(ranks, config, sharded)
    assert len(set(single.losses)) == 2
    for gradients in single.gradients:
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())


MIXTURES = {"moba": {"block": 8, "top_k": 3}, "mosa": {"sparsity": 4}, "lightning*3, dense": {}}
"""What `attention.mechanism` may say, with options."""
ALSO_SHARDED = [
    ParallelConfig(context=4, strategy="fetch", layout="balanced"),
    ParallelConfig(context=4, context_inner=2, strategy="hybrid"),
]
SHIPPED = ParallelConfig(context=2, strategy="ship")
"""For routed mechanisms only."""


@pytest.mark.parametrize("pattern", list(MIXTURES))
def test_steps_of_patterns_of_layers(base: Config, ranks: Pools, pattern: str) -> None:
    """Five steps on two ranks, two steps on others. Layers with a recurrence run under `state` if keys travel."""
    config = tiny.with_model(base, layers=4 if "," in pattern else 2)
    config = replace(config, attention=AttentionConfig(mechanism=pattern, options=MIXTURES[pattern], backend="cpu"))
    others = [*ALSO_SHARDED, *([SHIPPED] if pattern == "moba" else [])]
    for steps, sharded in ((5, SHARDED[:1]), (2, others)):
        short = replace(config, train=replace(config.train, steps=steps))
        single = ranks(1).run(train_sharded, short)[0]
        assert len(set(single.losses)) == len(single.losses) == steps
        for parallel in sharded:
            assert is_valid(replace(config, parallel=parallel))
            assert_same(ranks(parallel.context).run(train_sharded, replace(short, parallel=parallel))[1], single)


@pytest.mark.parametrize("name", ["dense", "moba", "mosa"])
def test_two_steps_of_a_model_that_convolves_its_keys(base: Config, ranks: Pools, name: str) -> None:
    """The weights start at 0; the second step is the first that they change. Recomputed blocks fetch keys again."""
    config = tiny.with_model(example(base, name), key_convolution=5)
    sharded = [replace(config, parallel=parallel) for parallel in SHARDED]
    sharded.append(replace(sharded[0], train=replace(config.train, recompute="block")))
    compare_on_two_ranks(ranks, config, sharded)


def test_routers_and_convolutions_in_bfloat16(base: Config, ranks: Pools) -> None:
    """Losses within 1 %; parameters and their gradients stay float32."""
    config = tiny.with_model(example(base, "mosa"), key_convolution=3)
    rounded = replace(config, parallel=SHARDED[0], train=replace(config.train, compute_dtype="bfloat16"))
    (single,) = ranks(1).run(two_steps, [config])[0]
    (trajectory,) = ranks(2).run(two_steps, [rounded])[0]
    assert trajectory.losses == pytest.approx(single.losses, rel=1e-2)
    assert {gradient.dtype for gradient in trajectory.gradients[-1].values()} == {torch.float32}

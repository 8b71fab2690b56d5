"""Every mechanism trains: losses and gradients of two steps do not depend on the ranks or the strategy."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.validate import validate
from tests.support import tiny
from tests.support.rank_pool import RankPool
from tests.support.steps import TOLERANCE, Trajectory, difference, train_dealt

STEPS = 2
ALONE = ParallelConfig(strategy="single")
DEALT = [
    ParallelConfig(context=2, strategy="ring", layout="zigzag"),
    ParallelConfig(context=2, strategy="ring", layout="striped"),
    ParallelConfig(context=2, strategy="ulysses"),
    ParallelConfig(context=2, strategy="fetch", layout="contiguous"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Eight query heads, which the mechanisms' examples are for."""
    folder: Path = tmp_path_factory.mktemp("mechanisms")
    config = tiny.config(tiny.make_data(folder), folder / "run", ALONE)
    return tiny.with_model(config, heads=8, head_dim=4)


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


def train_all(configs: list[Config]) -> list[Trajectory]:
    """On each rank: two steps of every run."""
    return [train_dealt(config, STEPS) for config in configs]


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_two_steps_do_not_depend_on_the_ranks(base: Config, ranks: Callable[[int], RankPool], name: str) -> None:
    config = example(base, name)
    (alone,) = ranks(1).run(train_all, [config])[0]
    assert len(set(alone.losses)) == STEPS
    for gradients in alone.gradients:
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    dealt = [run for parallel in DEALT if is_valid(run := replace(config, parallel=parallel))]
    assert dealt
    for of_rank in ranks(2).run(train_all, dealt):
        for run, trajectory in zip(dealt, of_rank, strict=True):
            assert difference(trajectory, alone) <= TOLERANCE, run.parallel


MIXTURES = {
    "moba": {"block": 8, "top_k": 3},
    "mosa": {"sparsity": 4},
    "lightning*7, dense": {},
}
"""What `attention.mechanism` may say, with options."""
ALSO_DEALT = [
    ParallelConfig(context=4, strategy="fetch", layout="balanced"),
    ParallelConfig(context=4, context_inner=2, strategy="hybrid"),
]
SHIPPED = ParallelConfig(context=2, strategy="ship")
"""For routed mechanisms alone."""


@pytest.mark.parametrize("pattern", list(MIXTURES))
def test_steps_of_patterns_of_layers(base: Config, ranks: Callable[[int], RankPool], pattern: str) -> None:
    """Ten steps on two ranks, two steps on four. Layers with a recurrence run under `state` if keys travel."""
    config = tiny.with_model(base, layers=8 if "," in pattern else 2)
    config = replace(config, attention=AttentionConfig(mechanism=pattern, options=MIXTURES[pattern], backend="cpu"))
    others = [*ALSO_DEALT, *([SHIPPED] if pattern == "moba" else [])]
    for steps, parallel in ((10, DEALT[0]), *((2, parallel) for parallel in others)):
        dealt = replace(config, parallel=parallel)
        assert is_valid(dealt)
        alone = ranks(1).run(train_dealt, config, steps)[0]
        assert len(set(alone.losses)) == len(alone.losses) == steps
        assert difference(ranks(parallel.context).run(train_dealt, dealt, steps)[1], alone) <= TOLERANCE, parallel


@pytest.mark.parametrize("name", ["dense", "moba", "mosa"])
def test_two_steps_of_a_model_that_convolves_its_keys(
    base: Config, ranks: Callable[[int], RankPool], name: str
) -> None:
    """The weights start at 0; the second step is the first that they change. Recomputed blocks fetch keys again."""
    config = tiny.with_model(example(base, name), key_convolution=5)
    (alone,) = ranks(1).run(train_all, [config])[0]
    dealt = [replace(config, parallel=parallel) for parallel in DEALT]
    dealt.append(replace(dealt[0], train=replace(config.train, recompute="block")))
    for of_rank in ranks(2).run(train_all, dealt):
        for run, trajectory in zip(dealt, of_rank, strict=True):
            assert difference(trajectory, alone) <= TOLERANCE, run.parallel


def test_routers_and_convolutions_in_bfloat16(base: Config, ranks: Callable[[int], RankPool]) -> None:
    """Losses within 1 %; parameters and their gradients stay float32."""
    config = tiny.with_model(example(base, "mosa"), key_convolution=3)
    rounded = replace(config, parallel=DEALT[0], train=replace(config.train, compute_dtype="bfloat16"))
    (alone,) = ranks(1).run(train_all, [config])[0]
    (trajectory,) = ranks(2).run(train_all, [rounded])[0]
    assert trajectory.losses == pytest.approx(alone.losses, rel=1e-2)
    assert {gradient.dtype for gradient in trajectory.gradients[-1].values()} == {torch.float32}


def test_a_router_is_one_matrix_for_each_layer(base: Config, ranks: Callable[[int], RankPool]) -> None:
    routers = {
        name: gradient.shape
        for name, gradient in ranks(1).run(train_all, [example(base, "mosa")])[0][0].gradients[0].items()
        if "router" in name
    }
    assert routers == {f"blocks.{layer}.attention.router.weight": torch.Size([2, 32]) for layer in range(2)}

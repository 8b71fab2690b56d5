"""Ten training steps of models with experts: however experts and tokens are sharded, all is as in one process.

The reference computes every expert on every token.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.model import experts as module
from farspan.trainer.model.attention import AttentionInputs
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.model.transformer import Block
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import Trajectory, assert_same, initial_parameters, train_reference, train_sharded

EXPERTS = {
    "softmax": ExpertsConfig(count=8, per_token=2, feed_forward=16, balance_loss=0.02, z_loss=0.01),
    "sigmoid, biased, shared, dense first": ExpertsConfig(
        count=8, per_token=3, feed_forward=16, shared=24, layers="dense, experts", score="sigmoid", scale=1.5,
        bias_rate=0.02, balance_loss=0.05, balance_over="step",
    ),
    "not normalized": ExpertsConfig(count=8, per_token=1, feed_forward=16, normalized=False, z_loss=0.1),
    "the heaviest within a capacity": ExpertsConfig(
        count=8, per_token=2, feed_forward=16, capacity=0.9, balance_loss=0.02, scale=0.5
    ),
    "the first within a capacity": ExpertsConfig(
        count=8, per_token=3, feed_forward=16, capacity=1.1, drop="position", score="sigmoid", bias_rate=0.01
    ),
    "experts choose": ExpertsConfig(
        count=8, per_token=2, feed_forward=16, choice="experts", normalized=False, z_loss=0.01, shared=8
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("experts")
    return tiny.config(tiny.make_data(folder), folder / "run", ParallelConfig(strategy="single"))


Truth = Callable[[str, int], Trajectory]


@pytest.fixture(scope="module")
def truth(base: Config, ranks: Pools) -> Truth:
    known: dict[tuple[str, int], Trajectory] = {}

    def compute(experts: str, together: int) -> Trajectory:
        if (experts, together) not in known:
            config = tiny.with_model(base, experts=EXPERTS[experts])
            known[experts, together] = train_reference(config, ranks(1).run(initial_parameters, config)[0], together)
        return known[experts, together]

    return compute


# (context, dp_shard, expert, strategy): every degree of each axis, folded and not. Kinds of experts take turns, as ten
# steps on 8 ranks take ten seconds.
MESHES = [
    (1, 2, 2, "single"), (2, 1, 1, "ring"), (2, 1, 2, "ulysses"), (2, 2, 1, "ulysses"), (2, 2, 2, "ring"),
    (2, 2, 4, "ulysses"), (4, 1, 4, "ring"), (4, 2, 4, "ulysses"), (4, 2, 8, "ring"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "experts"), [(mesh, list(EXPERTS)[number % len(EXPERTS)]) for number, mesh in enumerate(MESHES)]
)
def test_ten_steps_do_not_depend_on_the_ranks(
    base: Config, truth: Truth, ranks: Pools, mesh: tuple[int, int, int, str], experts: str
) -> None:
    context, data, expert, strategy = mesh
    parallel = ParallelConfig(context=context, dp_shard=data, expert=expert, strategy=strategy)
    config = tiny.with_model(replace(base, parallel=parallel), experts=EXPERTS[experts])
    courses = ranks(context * data).run(train_sharded, config)
    for course in (courses[0], courses[-1]):
        assert_same(course, truth(experts, data))


# By name: ranks, and whether blocks are recomputed; one rank accumulates gradients.
VARIANTS = {
    "recompute": (ParallelConfig(context=4, expert=2), "block"),
    "accumulation under recompute": (ParallelConfig(dp_shard=1, strategy="single"), "block"),
    "replicas": (ParallelConfig(context=2, dp_replicate=2, expert=2), "none"),
    "8 ranks of context and of experts": (ParallelConfig(context=8, expert=8, layout="striped"), "none"),
}


@pytest.mark.parametrize(("variant", "experts"), list(zip(VARIANTS, [*EXPERTS, *EXPERTS][1:], strict=False)))
def test_variants_of_the_run(base: Config, truth: Truth, ranks: Pools, variant: str, experts: str) -> None:
    parallel, recompute = VARIANTS[variant]
    config = replace(base, parallel=parallel, train=replace(base.train, recompute=recompute))
    data = parallel.dp_replicate * max(parallel.dp_shard, 1)
    courses = ranks(data * parallel.context).run(train_sharded, tiny.with_model(config, experts=EXPERTS[experts]))
    assert_same(courses[-1], truth(experts, data))


@pytest.mark.parametrize("parallel_blocks", [True, False])
def test_rows_travel_to_experts_during_attention_where_it_is_parallel(
    base: Config, monkeypatch: pytest.MonkeyPatch, parallel_blocks: bool
) -> None:
    config, events = tiny.with_model(base, experts=EXPERTS["softmax"], parallel_blocks=parallel_blocks).model, []
    block = Block(config, Dense(), has_experts=True, recompute=False)

    def send(x: Tensor, *rest: object) -> SimpleNamespace:
        events.append("rows leave")
        return SimpleNamespace(combine=lambda run: events.append("rows are awaited") or torch.zeros_like(x))

    def attend(q: Tensor, *rest: Tensor) -> Tensor:
        events.append("attention")
        return torch.zeros_like(q)

    monkeypatch.setattr(module, "send_to_experts", send)
    torch.nn.init.zeros_(block.feed_forward.bias)  # pyright: ignore[reportArgumentType]
    cos, sin = torch.ones(3, 4), torch.zeros(3, 4)
    inputs = AttentionInputs(torch.ones(3, dtype=torch.bool), cos, sin, attend, None)  # pyright: ignore
    places: Any = SimpleNamespace(sequence=SimpleNamespace(index=torch.arange(3)), channel=None)
    block(torch.zeros(3, config.width), inputs, places)
    first = ["rows leave", "attention"] if parallel_blocks else ["attention", "rows leave"]
    assert events == [*first, "rows are awaited"]

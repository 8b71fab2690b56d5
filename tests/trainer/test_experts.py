"""Five training steps of models with experts: however experts and tokens are sharded, all is as in one process.

The reference computes every expert on every token.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PADDING, PackedSequence
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.load_balance import ExpertLoad
from farspan.trainer.model import experts as module
from farspan.trainer.model.attention import AttentionInputs
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.model.transformer import Block, Transformer
from farspan.trainer.optim import build_optimizer
from farspan.trainer.step import StepResult, train_step
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import train_sharded
from tests.trainer.conftest import TrainAndCompare

eight = partial(ExpertsConfig, count=8, feed_forward=16)
EXPERTS = {
    "softmax": eight(per_token=2, balance_loss=1.0, z_loss=0.01),
    "sigmoid, biased, shared, dense first": eight(
        per_token=3, shared=24, layers="dense, experts", score="sigmoid", scale=1.5, bias_rate=0.02, balance_loss=0.05,
        balance_over="step",
    ),
    "not normalized": eight(per_token=1, normalized=False, z_loss=0.1),
    "the heaviest within a capacity": eight(per_token=2, capacity=0.9, balance_loss=0.02, scale=0.5),
    "the first within a capacity": eight(per_token=3, capacity=1.1, drop="position", score="sigmoid", bias_rate=0.01),
    "experts choose": eight(per_token=2, choice="experts", normalized=False, z_loss=0.01, shared=8),
}  # fmt: skip


# (context, dp_shard, expert, strategy): every degree of each axis, folded and not. Kinds of experts take turns.
MESHES = [
    (1, 2, 2, "single"), (2, 1, 1, "ring"), (2, 1, 2, "ulysses"), (2, 2, 1, "ulysses"), (2, 2, 2, "ring"),
    (2, 2, 4, "ulysses"), (4, 1, 4, "ring"), (4, 2, 4, "ulysses"), (4, 2, 8, "ring"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "experts"), [(mesh, list(EXPERTS)[number % len(EXPERTS)]) for number, mesh in enumerate(MESHES)]
)
def test_steps_do_not_depend_on_the_ranks(
    base: Config, train_and_compare: TrainAndCompare, mesh: tuple[int, int, int, str], experts: str
) -> None:
    context, data, expert, strategy = mesh
    parallel = ParallelConfig(context=context, dp_shard=data, expert=expert, strategy=strategy)
    train_and_compare(tiny.with_model(replace(base, parallel=parallel), experts=EXPERTS[experts]))


# By name: ranks, and whether blocks are recomputed; one rank accumulates gradients.
VARIANTS = {
    "recompute": (ParallelConfig(context=4, expert=2), "block"),
    "accumulation under recompute": (ParallelConfig(dp_shard=1, strategy="single"), "block"),
    "replicas": (ParallelConfig(context=2, dp_replicate=2, expert=2), "none"),
    "8 ranks of context and of experts": (ParallelConfig(context=8, expert=8, layout="striped"), "none"),
}


@pytest.mark.parametrize(("variant", "experts"), list(zip(VARIANTS, [*EXPERTS, *EXPERTS][1:], strict=False)))
def test_variants_of_the_run(base: Config, train_and_compare: TrainAndCompare, variant: str, experts: str) -> None:
    parallel, recompute = VARIANTS[variant]
    config = replace(base, parallel=parallel, train=replace(base.train, recompute=recompute))
    train_and_compare(tiny.with_model(config, experts=EXPERTS[experts]))


# Four sequences a step; of each family of routers, all that their balance depends on.
OVER_STEP = {
    "experts": eight(
        per_token=2, score="sigmoid", capacity=0.9, bias_rate=0.02, balance_loss=1.0, balance_over="step", z_loss=0.01
    ),
    "head_mixture": HeadMixtureConfig(
        kind="experts", count=3, per_token=2, bias_rate=0.01, balance_loss=1.0, balance_over="step"
    ),
}
SHARED_STEPS = {
    "accumulation 4": ParallelConfig(strategy="single"),
    "dp 2": ParallelConfig(dp_shard=2, strategy="single"),
    "dp 4": ParallelConfig(dp_shard=4, strategy="single"),
    "cp 2, ep 2": ParallelConfig(context=2, expert=2),
    "replicas 2, cp 2": ParallelConfig(dp_replicate=2, context=2),
}


@pytest.mark.parametrize(
    ("ranks_of_step", "recompute"),
    [*((name, "none") for name in SHARED_STEPS), ("accumulation 4", "block"), ("cp 2, ep 2", "block")],
)
def test_balance_over_a_step_is_one_function_of_its_tokens(
    base: Config, train_and_compare: TrainAndCompare, ranks_of_step: str, recompute: str
) -> None:
    """However ranks and micro-batches divide a step: losses, norms, gradients, loads and biases."""
    train = replace(base.train, steps=3, sequences_per_step=4, recompute=recompute)
    train_and_compare(tiny.with_model(replace(base, train=train, parallel=SHARED_STEPS[ranks_of_step]), **OVER_STEP))


def forward_passes(config: Config) -> int:
    """On a rank: those of one step."""
    with mock.patch.object(Transformer, "forward", autospec=True, side_effect=Transformer.forward) as passes:
        train_sharded(replace(config, train=replace(config.train, steps=1)))
    return passes.call_count


@pytest.mark.parametrize(
    ("balance", "sequences", "passes"),
    [
        ({"balance_loss": 0.1, "balance_over": "step"}, 4, 7),
        ({"balance_loss": 0.1, "balance_over": "step"}, 1, 1),
        ({"balance_loss": 0.0, "balance_over": "step"}, 4, 4),
        ({"balance_loss": 0.1, "balance_over": "sequence"}, 4, 4),
    ],
)
@pytest.mark.parametrize("family", OVER_STEP)
def test_micro_batches_are_routed_ahead_only_where_a_balance_needs_it(
    base: Config, ranks: Pools, family: str, balance: dict[str, Any], sequences: int, passes: int
) -> None:
    config = replace(base, train=replace(base.train, sequences_per_step=sequences))
    config = tiny.with_model(config, **{family: replace(OVER_STEP[family], **balance)})
    assert ranks(1).run(forward_passes, config) == [passes]


@pytest.mark.parametrize("parallel_blocks", [True, False])
def test_rows_travel_to_experts_during_attention_where_it_is_parallel(
    base: Config, monkeypatch: pytest.MonkeyPatch, parallel_blocks: bool
) -> None:
    config, events = tiny.with_model(base, experts=EXPERTS["softmax"], parallel_blocks=parallel_blocks).model, []
    block = Block(config, Dense(), has_experts=True, recompute=False)

    def send(x: Tensor, *rest: object, **options: object) -> SimpleNamespace:
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


def test_the_summary_of_loads_by_hand() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [2, 1, 0, 0]])
    bias = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-0.5, 0.25, 0.25, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    found = ExpertLoad(
        counts=counts, dropped=torch.tensor([0, 4, 2, 1]), balance_loss=0.5, z_loss=0.25, bias=bias
    ).summary("expert")
    assert found == {
        "expert_balance_loss": 0.5,
        "expert_z_loss": 0.25,
        # In float64: no third is exact.
        "expert_dropped": {"0": 0.0, "1": 0.25, "2": 0.125, "3": 1 / 3},
        # Of 3 choices among 4 experts the busiest has 2, where 0.75 would be even.
        "expert_load": {"0": 1.0, "1": 4.0, "2": 2.0, "3": pytest.approx(8 / 3, rel=1e-15)},
        "expert_entropy": {
            "0": pytest.approx(1.0), "1": pytest.approx(0.0), "2": pytest.approx(0.5),
            "3": pytest.approx((math.log(3) - 2 / 3 * math.log(2)) / math.log(4), rel=1e-14),
        },
        "expert_bias": {"0": 0.0, "1": 0.75, "2": 0.0, "3": 0.0},
    }  # fmt: skip


def test_a_step_without_tokens_has_no_load() -> None:
    idle = torch.zeros(1, 4)
    found = ExpertLoad(counts=idle, dropped=idle[:, 0], balance_loss=0.0, z_loss=0.0, bias=idle).summary("expert")
    assert found["expert_load"] == {"0": 0.0}
    assert found["expert_entropy"] == {"0": 0.0}


@pytest.mark.parametrize("balance_over", ["sequence", "step"])
def test_a_step_of_padding_alone_has_no_auxiliary_loss(base: Config, ranks: Pools, balance_over: str) -> None:
    config = tiny.with_model(base, experts=replace(EXPERTS["softmax"], balance_over=balance_over))
    (found,) = ranks(1).run(step_of_padding, config)
    assert found.skipped == "no token of its sequences has a label"
    assert found.gradient_norm == found.experts.balance_loss == found.experts.z_loss == 0
    assert not found.experts.counts.any()


def step_of_padding(config: Config) -> StepResult:
    """On a rank."""
    mesh, device, length = Mesh.build(config.parallel, "cpu"), torch.device("cpu"), 5
    model, batches = build_model(config, mesh, device), build_batches(config, mesh, device, Traffic())
    nothing = PackedSequence(
        tokens=np.zeros(length, np.int64),
        labels=np.full(length, IGNORED),
        position=np.zeros(length, np.int32),
        document=np.full(length, PADDING, np.int32),
    )
    optimizer = build_optimizer(model, config.optimizer)
    return train_step(Fsdp2Engine(model, optimizer), [batches.build(nothing)] * 2, context=batches.channel)


ROUTED: dict[str, dict[str, Any]] = {
    "experts": {"experts": EXPERTS["the heaviest within a capacity"], "key_convolution": 3},
    "experts choose": {"experts": EXPERTS["experts choose"], "parallel_blocks": True},
    "heads": {"head_mixture": HeadMixtureConfig(kind="heads", per_token=2), "qk_norm": False},
    "experts of attention": {"head_mixture": HeadMixtureConfig(kind="experts", count=3, per_token=2)},
}


@pytest.mark.parametrize("variant", ROUTED)
def test_padding_reaches_no_gradient(base: Config, ranks: Pools, variant: str) -> None:
    """Its token's embedding may hold anything."""
    config = replace(tiny.with_model(base, **ROUTED[variant]), parallel=ParallelConfig(context=2))
    for expected, found in ranks(2).run(gradients_with_padding, config, [1.0, math.nan]):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def gradients_with_padding(config: Config, embeddings: list[float]) -> list[dict[str, Tensor]]:
    """On a rank: of a sequence whose padding is a token of its own, for each value of that token's embedding."""
    mesh, device, length, real = Mesh.build(config.parallel, "cpu"), torch.device("cpu"), 31, 18
    tokens = np.arange(length) % 7 + 1
    tokens[real:] = 0
    sequence = PackedSequence(
        tokens=tokens,
        labels=np.where(np.arange(length) < real, tokens, IGNORED),
        position=np.arange(length, dtype=np.int32),
        document=np.where(np.arange(length) < real, 0, PADDING).astype(np.int32),
    )
    model, batches = build_model(config, mesh, device), build_batches(config, mesh, device, Traffic())
    batch, gradients = batches.build(sequence), []
    for value in embeddings:
        # The first rows of the table are those of the first rank.
        if dist.get_rank() == 0:
            model.embedding.weight.to_local().detach()[0] = value  # pyright: ignore[reportAttributeAccessIssue]
        model.zero_grad()
        model(batch.tokens, batch.labels, batch.context).losses.sum().backward()
        gradients.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})  # pyright: ignore
    return gradients

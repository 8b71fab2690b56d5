"""MiniMax-01's layer against its formulas, and in training on any number of ranks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.model.attention import AttentionInputs, GatedRecurrence
from farspan.trainer.model.config import ExpertsConfig, ModelConfig, RopeConfig
from tests.support import tiny
from tests.support.decoder import gated_recurrence
from tests.support.rank_pool import Pools
from tests.support.steps import train_sharded
from tests.trainer.conftest import TrainAndCompare, Truth


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_layer_on_packed_documents(backend: str) -> None:
    """Out, and the gradients of the input and of every parameter, in float64."""
    model = ModelConfig(layers=4, width=10, heads=3, kv_heads=1, head_dim=4, feed_forward=8, norm_epsilon=1e-3)
    rows, mechanism, generator = Rows.packed([9, 1, 23]), Lightning(layer=2, layers=4), torch.Generator().manual_seed(0)
    layer = GatedRecurrence(model).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    strategy = STRATEGIES.get("single")(Unconnected(0, 1))
    shards = Shards.build(rows, layout="contiguous", degree=1)
    attention = strategy.prepare(mechanism, shards, Heads(query=3, kv=3), backend=backend)
    x, dout = torch.randn(2, 33, 10, dtype=torch.float64, generator=generator)
    unused = torch.empty(0)
    out, _ = layer(x.requires_grad_(), AttentionInputs(unused, unused, unused, attention, None))
    visible = (rows.document[:, None] == rows.document[None]) & (rows.position[:, None] >= rows.position[None])
    parameters: dict[str, Tensor] = {f"blocks.2.attention.{name}": p for name, p in layer.named_parameters()}
    truth = gated_recurrence(parameters, "blocks.2.attention.", model, x, rows.position, visible)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    wanted = [x, *parameters.values()]
    assert len(wanted) == 1 + 6
    gradients = zip(torch.autograd.grad(out, wanted, dout), torch.autograd.grad(truth, wanted, dout), strict=True)
    for gradient, expected in gradients:
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@pytest.fixture(scope="module")
def base(base: Config) -> Config:
    """Layers that are not gated have two KV heads and rotate half of each head."""
    return tiny.with_model(base, layers=3, recurrent_layer="gated", rope=RopeConfig(rotated=4))


def with_mechanism(config: Config, pattern: str) -> Config:
    return replace(config, attention=AttentionConfig(mechanism=pattern, backend="cpu"))


HYBRID = "lightning*2, dense"


@pytest.mark.parametrize(
    ("pattern", "strategy", "context", "layout"),
    [
        ("lightning", "state", 2, "zigzag"),
        ("lightning", "state", 4, "contiguous"),
        (HYBRID, "ring", 1, "zigzag"),
        (HYBRID, "ring", 4, "striped"),
        (HYBRID, "ulysses", 4, "balanced"),
    ],
)
def test_steps_do_not_depend_on_the_ranks(
    base: Config, train_and_compare: TrainAndCompare, pattern: str, strategy: str, context: int, layout: str
) -> None:
    """With `ring`, recurrences run with `state`. On 4 ranks, blocks are recomputed."""
    parallel = ParallelConfig(context=context, strategy=strategy, layout=layout)
    train = replace(base.train, recompute="block" if context == 4 else "none")
    trajectories = train_and_compare(with_mechanism(replace(base, parallel=parallel, train=train), pattern))
    assert any(name.endswith("attention.gate.weight") for name in trajectories[0].gradients[0])


@pytest.mark.parametrize(("context", "data"), [(4, 1), (2, 2)])
def test_steps_with_experts(base: Config, train_and_compare: TrainAndCompare, context: int, data: int) -> None:
    """All of MiniMax-01: context and expert parallelism over the same 4 ranks, or context 2 x dp_shard 2."""
    experts = ExpertsConfig(count=8, per_token=2, feed_forward=16, balance_loss=0.02)
    parallel = ParallelConfig(context=context, dp_shard=data, expert=4)
    train_and_compare(tiny.with_model(with_mechanism(replace(base, parallel=parallel), HYBRID), experts=experts))


def test_bfloat16_follows_float64(base: Config, truth: Truth, ranks: Pools) -> None:
    """Losses within 1 %; parameters and their gradients stay float32."""
    config = with_mechanism(replace(base, parallel=ParallelConfig(context=2)), HYBRID)
    rounded = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    course = ranks(2).run(train_sharded, rounded)[0]
    assert course.losses == pytest.approx(truth(config).losses, rel=1e-2)
    assert len(set(course.losses)) == base.train.steps
    assert {gradient.dtype for gradient in course.gradients[-1].values()} == {torch.float32}

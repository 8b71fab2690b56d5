from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.build import build_model
from farspan.trainer.config import Config
from farspan.trainer.model import init
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer
from tests.support import tiny
from tests.support.rank_pool import Pools

CONFIG = tiny.config(Path("nowhere"), Path("nowhere"), ParallelConfig())


def full_parameters(config: Config, block_rows: int) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "BLOCK_ROWS", block_rows)
        model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}  # pyright: ignore


@pytest.mark.parametrize("block_rows", [1024, 5])
def test_parameters_do_not_depend_on_the_sharding(ranks: Pools, block_rows: int) -> None:
    """Shards that cut random streams, and streams that cut shards; a width that 4 ranks cannot split evenly."""
    config = tiny.with_model(CONFIG, feed_forward=50)
    parallel = [ParallelConfig(), ParallelConfig(context=2, dp_replicate=2)]
    expected = ranks(1).run(full_parameters, config, block_rows)[0]
    for layout in parallel:
        for sharded in ranks(4).run(full_parameters, replace(config, parallel=layout), block_rows):
            torch.testing.assert_close(sharded, expected, rtol=0, atol=0)


def test_distributions_and_seeds() -> None:
    config = tiny.with_model(
        CONFIG,
        width=256,
        feed_forward=512,
        head_dim=32,
        layers=3,
        key_convolution=3,
        qkv_bias=True,
        recurrent_layer="gated",
    ).model
    model = Transformer(config, [MoSA(), MoSA(), Lightning(layer=2, layers=3)])
    initialize(model, config, seed=1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    stds = {
        **dict.fromkeys(("query", "key", "value", "router", "gate", "up"), 256**-0.5),
        "embedding": 1.0, "head": 0.02, "out": (4 * 32) ** -0.5 / 6**0.5, "down": 512**-0.5 / 6**0.5,
    }  # fmt: skip
    for name, value in first.items():
        if (std := stds.get(name.split(".")[-2])) and not name.endswith("bias"):
            # A router has only 512 numbers, so that mean and deviation vary more.
            slack = max(0.05, 3.5 * value.numel() ** -0.5)
            assert value.std().item() == pytest.approx(std, rel=slack), name
            assert abs(value.mean().item()) < std * slack, name
        if "key_convolution" in name or name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
    assert {"blocks.2.attention.gate.weight", "blocks.2.attention.norm.weight"} <= first.keys()
    biases = {f"blocks.{layer}.attention.{part}.bias" for layer in (0, 1) for part in ("query", "key", "value")}
    assert biases == {name for name in first if name.endswith("bias")}
    assert not torch.equal(first["blocks.0.feed_forward.gate.weight"], first["blocks.1.feed_forward.gate.weight"])
    initialize(model, config, seed=2)
    assert not torch.equal(first["head.weight"], model.head.weight)
    initialize(model, config, seed=1)
    assert torch.equal(first["head.weight"], model.head.weight)


@pytest.mark.parametrize("count", [2, 8])
def test_an_expert_starts_as_if_it_were_alone(count: int) -> None:
    """Weights of the chosen ones add up to 1, so that the fan-in is that of one."""
    experts = ExpertsConfig(count=count, feed_forward=128, shared=64)
    mixture = HeadMixtureConfig(kind="experts", count=count, per_token=2)
    config = tiny.with_model(CONFIG, width=256, head_dim=32, layers=3, experts=experts, head_mixture=mixture).model
    model = Transformer(config, [Dense()] * 3)
    initialize(model, config, seed=1)
    stds = {
        **{f"feed_forward.{name}": 256**-0.5 for name in ("experts.gate", "experts.up", "shared.gate", "router")},
        **{f"attention.{name}": 256**-0.5 for name in ("query", "key", "value", "head_router")},
        "feed_forward.experts.down": 128**-0.5 / 6**0.5, "feed_forward.shared.down": 64**-0.5 / 6**0.5,
        "attention.out": (4 * 32) ** -0.5 / 6**0.5,
    }  # fmt: skip
    for name, std in stds.items():
        value = model.blocks[1].get_parameter(f"{name}.weight")
        assert value.std().item() == pytest.approx(std, rel=max(0.05, 3.5 * value.numel() ** -0.5)), name


def test_a_tied_embedding_starts_as_a_head() -> None:
    config = tiny.with_model(CONFIG, width=256, tied_embeddings=True).model
    model = Transformer(config, [Dense()] * config.layers)
    initialize(model, config, seed=1)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)

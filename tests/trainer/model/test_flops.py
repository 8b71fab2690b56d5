"""Parameters and FLOPs against a model that exists, and against sums written out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, ModelConfig
from farspan.trainer.model.experts import ExpertMatrices
from farspan.trainer.model.flops import attention_flops, matrix_parameters, total_parameters, training_flops
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.toml_config import load_config


class Detached(NAtS):  # pyright: ignore[reportGeneralTypeIssues]
    """The gradient of its router, of three numbers for each token and KV head, stops at its input."""

    routing_reads_detached = True


CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def small(**changes: Any) -> ModelConfig:
    config = ModelConfig(layers=3, width=24, heads=8, kv_heads=2, head_dim=4, feed_forward=14, vocabulary_size=23)
    return replace(config, **changes)


def assert_counted(config: ModelConfig, mechanisms: Sequence[Mechanism], active_heads: float = 1) -> None:
    """Compare with the parameters of a model; `active_heads`: the share of heads that a token chooses."""
    with torch.device("meta"):
        model = Transformer(config, mechanisms)
    assert total_parameters(config, mechanisms) == sum(p.numel() for p in model.parameters())
    active = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            chosen = active_heads if name.endswith(("attention.query", "attention.out")) else 1
            active += chosen * layer.weight.numel()
        elif isinstance(layer, ExpertMatrices):
            active += layer.weight[: config.experts.per_token].numel()
    assert matrix_parameters(config, mechanisms) == round(active)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("mechanism", "key_convolution"), [(Dense(), 0), (MoSA(), 3), (NAtS(), 5)], ids=["Dense", "MoSA", "NAtS"]
)
def test_parameters_of_dense_models(mechanism: Mechanism, key_convolution: int, qk_norm: bool, tied: bool) -> None:
    config = small(key_convolution=key_convolution, qk_norm=qk_norm, qkv_bias=tied, tied_embeddings=tied)
    assert_counted(config, [mechanism, Dense(), mechanism])


def test_parameters_of_experts() -> None:
    experts = ExpertsConfig(count=6, per_token=2, feed_forward=7, shared=5, layers="dense, experts*2")
    assert_counted(small(experts=experts), [Dense()] * 3)


@pytest.mark.parametrize("mechanisms", [[Lightning()] * 3, [Lightning(), MoSA(), Lightning(layer=2, layers=3)]])
@pytest.mark.parametrize("mixture", [HeadMixtureConfig(), HeadMixtureConfig(kind="heads", per_token=4)])
def test_parameters_of_gated_recurrences(mechanisms: list[Mechanism], mixture: HeadMixtureConfig) -> None:
    """With head mixtures in the other layers, whose tokens choose all heads; gated layers have none."""
    bias = mixture.kind == "none"
    config = small(qk_norm=True, qkv_bias=bias, key_convolution=3, recurrent_layer="gated", head_mixture=mixture)
    assert_counted(config, mechanisms)


@pytest.mark.parametrize(
    ("mixture", "active_heads"),
    [
        (HeadMixtureConfig(kind="experts", count=5, per_token=2), 2 / 5),
        (HeadMixtureConfig(kind="experts", count=3, per_token=3, own_keys=True), 1),
        (HeadMixtureConfig(kind="heads", shared=1, per_token=2), 3 / 4),
    ],
)
def test_parameters_and_flops_of_head_mixtures(mixture: HeadMixtureConfig, active_heads: float) -> None:
    config = small(qk_norm=True, parallel_blocks=True, head_mixture=mixture)
    assert_counted(config, [Dense()] * 3, active_heads)
    heads = config.heads_of(Dense()).query
    assert heads == round(config.projected_heads_of(Dense()).query * active_heads)
    assert attention_flops(config, [Dense()] * 3, Rows.packed([7])) == 3 * heads * 4 * 4 * (7 * 8 // 2)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama3_8b_128k", 8_030_261_248),
        ("qwen3_8b_128k", 8_190_735_360),
        ("qwen3_30b_a3b_128k", 30_532_122_624),
        ("mixtral_8x7b_64k", 46_702_792_704),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    """As counted in the released weights: Llama-3.1-8B 8.03B, Qwen3-8B 8.19B, Qwen3-30B-A3B 30.5B, Mixtral 46.7B."""
    config = load_config(Config, CONFIGS / f"{preset}.toml")
    assert total_parameters(config.model, config.mechanisms()) == parameters


@pytest.mark.parametrize(
    ("preset", "billions"), [("qwen3_30b_a3b_128k", 3.35), ("mixtral_8x7b_64k", 12.88), ("minimax_style", 2.66)]
)
def test_presets_have_the_published_number_of_active_parameters(preset: str, billions: float) -> None:
    """Both tables counted, as published: Qwen3 3.3B, Mixtral 12.9B; the third is what its file says."""
    config = load_config(Config, CONFIGS / f"{preset}.toml")
    embedding = config.model.width * config.model.vocabulary_size
    assert (matrix_parameters(config.model, config.mechanisms()) + embedding) / 1e9 == pytest.approx(billions, abs=5e-3)


def test_parameters_of_minimax_01() -> None:
    """456 billion, of which a token meets 45.9 (arXiv 2501.08313), tables left out: the size of the gated layers."""
    config = ModelConfig(
        layers=80, width=6144, heads=64, kv_heads=8, head_dim=128, feed_forward=9216, vocabulary_size=200_064,
        recurrent_layer="gated", experts=ExpertsConfig(count=32, per_token=2, feed_forward=9216),
    )  # fmt: skip
    mechanisms = AttentionConfig(mechanism="lightning*7, dense").build_mechanisms(config.layers)
    assert total_parameters(config, mechanisms) / 1e9 == pytest.approx(456, abs=0.5)
    head = config.width * config.vocabulary_size
    assert (matrix_parameters(config, mechanisms) - head) / 1e9 == pytest.approx(45.9, abs=0.05)


def test_flops_of_a_sequence_written_out() -> None:
    config = ModelConfig(layers=2, width=4, heads=3, kv_heads=1, head_dim=2, feed_forward=5, vocabulary_size=7)
    tokens, pairs = 3, 6
    # Products [m, k] x [k, n] of one layer, 2 m k n FLOPs each: q, k, v, out, gate, up, down; then the head.
    shapes = [(3, 4, 6), (3, 4, 2), (3, 4, 2), (3, 6, 4), (3, 4, 5), (3, 4, 5), (3, 5, 4)] * 2 + [(3, 4, 7)]
    forward = sum(2 * m * k * n for m, k, n in shapes)
    # For each visible pair, head and layer: a score over 2 features and a weighted sum of 2 values.
    attention = 2 * pairs * 3 * (2 * 2 + 2 * 2)
    forward += attention
    rows = Rows.packed([tokens])
    assert attention_flops(config, [Dense()] * 2, rows) == attention
    # A recurrence adds k v^T to a sum of 2 x 2 and reads it: 2 products of 2 x 2 for each token and head.
    assert attention_flops(config, [Dense(), Lightning()], rows) == attention / 2 + 3 * 3 * 2 * 2 * 2 * 2
    # The backward pass has two products for each of the forward pass.
    assert training_flops(config, [Dense()] * 2, tokens, attention) == 3 * forward
    # A convolution of the 2 features of a key, of which each reads 5.
    convolving = replace(config, key_convolution=5)
    assert training_flops(convolving, [Dense()] * 2, tokens, attention) == 3 * (forward + 2 * (2 * 3 * 2 * 5))
    # A router of 3 numbers per KV head; one product less where its gradient stops at its input.
    router = 2 * (2 * 3 * 4 * 3)
    assert training_flops(config, [NAtS()] * 2, tokens, attention) == 3 * (forward + router)
    assert training_flops(config, [Detached()] * 2, tokens, attention) == 3 * forward + 2 * router
    mixed = training_flops(config, [Detached(), NAtS()], tokens, attention)
    assert mixed == 3 * forward + 2 * router / 2 + 3 * router / 2

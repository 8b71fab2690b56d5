"""Parameters and FLOPs against a model that exists, and against sums written out by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from farspan.trainer.config import Config
from farspan.trainer.config_io import load_config
from farspan.trainer.flops import matrix_parameters, total_parameters, training_flops
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.transformer import Transformer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(qk_norm: bool, tied: bool) -> None:
    config = ModelConfig(
        layers=3, width=10, heads=6, kv_heads=2, head_dim=4, feed_forward=14, vocabulary_size=23, qk_norm=qk_norm,
        tied_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    assert total_parameters(config) == sum(p.numel() for p in model.parameters())
    products = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert matrix_parameters(config) == sum(weight.numel() for weight in products)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("llama3_8b_128k", 8_030_261_248), ("qwen3_8b_128k", 8_190_735_360)]
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    """As counted in the released weights: Llama-3.1-8B 8.03B, Qwen3-8B 8.19B."""
    assert total_parameters(load_config(Config, CONFIGS / f"{preset}.toml").model) == parameters


def test_flops_of_a_sequence_written_out() -> None:
    config = ModelConfig(layers=2, width=4, heads=3, kv_heads=1, head_dim=2, feed_forward=5, vocabulary_size=7)
    tokens, pairs = 3, 6
    # Products [m, k] x [k, n] of one layer, 2 m k n FLOPs each: q, k, v, out, gate, up, down; then the head.
    shapes = [(3, 4, 6), (3, 4, 2), (3, 4, 2), (3, 6, 4), (3, 4, 5), (3, 4, 5), (3, 5, 4)] * 2 + [(3, 4, 7)]
    forward = sum(2 * m * k * n for m, k, n in shapes)
    # For each visible pair, head and layer: a score over 2 features and a weighted sum of 2 values.
    forward += pairs * 3 * 2 * (2 * 2 + 2 * 2)
    # The backward pass has two products for each of the forward pass.
    assert training_flops(config, tokens, pairs) == 3 * forward

"""FLOPs that the mathematics needs, for MFU: no recomputation, no padding, attention by visible pairs.

A multiply-add is two FLOPs; the backward pass of a matrix product is two products of the same size.
"""

from farspan.kernels.mechanism import Mechanism
from farspan.trainer.model.config import ModelConfig


def router_parameters(config: ModelConfig, mechanism: Mechanism) -> int:
    """Parameters of the routers of all layers."""
    return config.layers * config.width * config.kv_heads * mechanism.routing_width


def matrix_parameters(config: ModelConfig, mechanism: Mechanism) -> int:
    """Parameters that multiply every token: all matrices and convolutions, no embedding table (a look-up)."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    attention += config.key_convolution * config.kv_heads * config.head_dim
    feed_forward = 3 * config.width * config.feed_forward
    layers = config.layers * (attention + feed_forward) + router_parameters(config, mechanism)
    return layers + config.width * config.vocabulary_size


def training_flops(config: ModelConfig, mechanism: Mechanism, tokens: int, visible_pairs: int) -> int:
    """Forward and backward FLOPs of `tokens` with `visible_pairs` (query, key) pairs per head and layer.

    Attention costs 4 D FLOPs a pair forward (scores and values), twice that backward. A router whose gradient stops at
    its input has one product in its backward pass.
    """
    attention = 12 * config.layers * config.heads * config.head_dim * visible_pairs
    stopped = 2 * router_parameters(config, mechanism) if mechanism.routing_reads_detached else 0
    return (6 * matrix_parameters(config, mechanism) - stopped) * tokens + attention


def total_parameters(config: ModelConfig, mechanism: Mechanism) -> int:
    """All parameters, tied ones once."""
    norms = config.layers * (2 * config.width + (2 * config.head_dim if config.qk_norm else 0)) + config.width
    embedding = 0 if config.tied_embeddings else config.width * config.vocabulary_size
    return matrix_parameters(config, mechanism) + embedding + norms

"""FLOPs that the mathematics needs, for MFU: no recomputation, no padding, attention by visible pairs.

A multiply-add is two FLOPs; the backward pass of a matrix product is two products of the same size.
"""

from farspan.trainer.model.config import ModelConfig


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that multiply every token: all matrices, the embedding table excluded (a look-up)."""
    attention = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    feed_forward = 3 * config.width * config.feed_forward
    return config.layers * (attention + feed_forward) + config.width * config.vocabulary_size


def training_flops(config: ModelConfig, tokens: int, visible_pairs: int) -> int:
    """Forward and backward FLOPs of `tokens` with `visible_pairs` (query, key) pairs per head and layer.

    Attention costs 4 D FLOPs a pair forward (scores and values), twice that backward.
    """
    attention = 12 * config.layers * config.heads * config.head_dim * visible_pairs
    return 6 * matrix_parameters(config) * tokens + attention


def total_parameters(config: ModelConfig) -> int:
    """All parameters, tied ones once."""
    norms = config.layers * (2 * config.width + (2 * config.head_dim if config.qk_norm else 0)) + config.width
    embedding = 0 if config.tied_embeddings else config.width * config.vocabulary_size
    return matrix_parameters(config) + embedding + norms

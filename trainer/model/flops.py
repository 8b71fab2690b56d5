"""Parameters, and model FLOPs for MFU: no recomputation, no padding, attention by unmasked pairs.

A multiply-add is two FLOPs; the backward pass of a matrix product is two products of the same size.
"""

from collections.abc import Sequence

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.trainer.model.config import ModelConfig


def router_parameters(config: ModelConfig, mechanisms: Sequence[Mechanism]) -> int:
    """Parameters of the routers of layers with these mechanisms."""
    return sum(
        config.width * config.projected_heads_of(mechanism).kv * mechanism.routing_width for mechanism in mechanisms
    )


def projection_parameters(config: ModelConfig, mechanism: Mechanism) -> int:
    """Active parameters of a layer's projections and convolution; without a mechanism's router.

    Where tokens choose heads, only as many count as one token chooses.
    """
    heads, gated = config.heads_of(mechanism), config.is_gated(mechanism)
    projections = config.width * config.head_dim * ((3 if gated else 2) * heads.query + 2 * heads.kv)
    choice = config.build_head_router() if config.mixes_heads(mechanism) else None
    projections += 0 if choice is None else config.width * choice.logits
    return projections + (0 if gated else config.key_convolution * heads.kv * config.head_dim)


def matrix_parameters(config: ModelConfig, mechanisms: Sequence[Mechanism]) -> int:
    """Active parameters per token: those of all matrices and convolutions, of the experts and heads that it chooses.

    The embedding table is a look-up and does not count.
    """
    attention = sum(projection_parameters(config, mechanism) for mechanism in mechanisms)
    feed_forward = feed_forward_parameters(config, config.experts.per_token)
    layers = attention + feed_forward + router_parameters(config, mechanisms)
    return layers + config.width * config.vocabulary_size


def feed_forward_parameters(config: ModelConfig, experts: int) -> int:
    """Parameters of the feed-forward of all layers, counting `experts` experts of each mixture."""
    mixture, with_experts = config.experts, sum(config.expert_layers)
    inner = (config.layers - with_experts) * config.feed_forward
    inner += with_experts * (experts * mixture.feed_forward + mixture.shared)
    return 3 * config.width * inner + with_experts * config.width * mixture.count


def attention_flops(config: ModelConfig, mechanisms: Sequence[Mechanism], rows: Rows) -> int:
    """Forward FLOPs of one sequence's attention in all layers; softmax attention takes 4 D for an unmasked pair."""
    once = {m: m.useful_flops(rows, config.head_dim, config.head_dim) for m in dict.fromkeys(mechanisms)}
    return sum(config.heads_of(mechanism).query * once[mechanism] for mechanism in mechanisms)


def training_flops(config: ModelConfig, mechanisms: Sequence[Mechanism], tokens: int, attention: float) -> float:
    """Forward and backward FLOPs of `tokens`; `attention` is what their attention takes forward.

    The backward pass takes twice the forward pass, less one product for a router whose gradient stops at its input.
    """
    detached = 2 * router_parameters(config, [m for m in mechanisms if m.routing_reads_detached])
    return (6 * matrix_parameters(config, mechanisms) - detached) * tokens + 3 * attention


def total_parameters(config: ModelConfig, mechanisms: Sequence[Mechanism]) -> int:
    """All parameters, tied ones once."""
    in_blocks = (1 if config.parallel_blocks else 2) * config.layers * config.width
    # Inside attention: one over all heads of a gated recurrence, or those of queries and keys.
    of_heads = 2 * config.head_dim if config.qk_norm else 0
    in_attention = sum(config.heads * config.head_dim if config.is_gated(m) else of_heads for m in mechanisms)
    norms = in_blocks + in_attention + config.width
    biased = [config.projected_heads_of(m) for m in mechanisms if config.qkv_bias and not config.is_gated(m)]
    biases = sum(heads.query + 2 * heads.kv for heads in biased) * config.head_dim
    embedding = 0 if config.tied_embeddings else config.width * config.vocabulary_size
    inactive = feed_forward_parameters(config, config.experts.count)
    inactive -= feed_forward_parameters(config, config.experts.per_token)
    inactive_heads = sum(config.projected_heads_of(m).query - config.heads_of(m).query for m in mechanisms)
    inactive += 2 * config.width * config.head_dim * inactive_heads  # columns of query, rows of out
    return matrix_parameters(config, mechanisms) + inactive + embedding + norms + biases

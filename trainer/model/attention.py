"""Attention layers: projections, norms and RoPE around the attention that a mechanism and a strategy have planned.

Legend: T local tokens of one micro-batch, C width, H heads, Hq query heads, Hk KV heads, D head dim.

Where q goes next: `trainer/build.py` chooses mechanism, strategy and backend of each layer; `trainer/batch.py` plans
them for a sequence, as `inputs.attention`. Calling that runs the strategy, `parallel/context_parallel/strategy.py`,
which moves keys, heads or queries between ranks and runs the backend's kernels, `kernels/attention.py`, on each block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farspan.kernels.layers.norm import residual_rms_norm, rms_norm
from farspan.kernels.layers.rope import rotate_queries_and_keys
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.routing.router_logits import routing_logits
from farspan.parallel.context_parallel.eager import eager
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import RoutingStatistics


class AttentionInputs:
    """What an attention layer needs to know of the sequence beside its tokens.

    real: tokens that are not padding, bool `[T]`. cos, sin: `[T, D/2]`, float32 whatever the compute dtype.
    attention: over the full sequence, for the local queries; it communicates.
    """

    # No dataclass, as FSDP walks through the fields of those at every call, here through all plans.
    def __init__(
        self,
        real: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: DistributedAttention,
        key_convolution: KeyConvolution | None,
    ) -> None:
        self.real, self.cos, self.sin = real, cos, sin
        self.attention, self.key_convolution = attention, key_convolution


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)

    def of_residual(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x, or x + delta, and its norm."""
        return residual_rms_norm(x, delta, self.weight, self.epsilon)


class Router(nn.Linear):
    """Routing logits of a mechanism: numbers for each token and KV head, in the accumulation dtype."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        heads = config.projected_heads_of(mechanism).kv
        super().__init__(config.width, heads * mechanism.routing_width, bias=False)
        self.kv_heads, self.detached = heads, mechanism.routing_reads_detached

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach() if self.detached else input
        # [T, Hk * routing_width] -> [T, Hk, routing_width]
        return routing_logits(x, self.weight).unflatten(-1, (self.kv_heads, -1))


@eager
def _attend(
    attention: DistributedAttention, q: Tensor, k: Tensor, v: Tensor, x: Tensor, router: Router | None = None
) -> Tensor:
    """Return the output of each query head `[T, Hq, D]`. What follows communicates and has kernels of its own."""
    routing = () if router is None else (router(x),)  # [T, Hk, routing_width]
    # The seam between model and parallelism, see above: keys of all ranks for the queries of this one.
    return attention(q, k, v, *routing)


@eager
def _convolve(convolution: KeyConvolution, k: Tensor, taps: Tensor) -> Tensor:
    return convolution(k, taps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245).

    Keys are convolved as projected: before their norm, so that the norm still bounds the scores; and before RoPE, so
    that scores still depend on distances only, as SiLU of rotated keys would depend on positions. The paper does not
    say where it convolves.
    """

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__()
        self.head_dim, heads = config.head_dim, config.projected_heads_of(mechanism)
        query_width, kv_width = heads.query * config.head_dim, heads.kv * config.head_dim
        self.query = nn.Linear(config.width, query_width, bias=config.qkv_bias)
        self.key = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.value = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.out = nn.Linear(query_width, config.width, bias=False)
        self.query_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.key_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.router = Router(config, mechanism) if mechanism.routing_width else None
        # Its weight are the taps, `[Hk * D, taps]`: many rows, so that FSDP shards them evenly.
        taps = config.key_convolution
        self.key_convolution = nn.Linear(taps, kv_width, bias=False) if taps else None

    def forward(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, RoutingStatistics | None]:
        """`[T, C] -> [T, C]`, and the statistics of a choice of heads."""
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # [T, Hq * D] -> [T, Hq, D]
        return self.out(self.head_outputs(q, x, inputs).flatten(1)), None  # [T, Hq, D] -> [T, Hq * D] -> [T, C]

    def head_outputs(self, q: Tensor, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return the output of each query head `[T, Hq, D]`, for q `[T, Hq, D]` as projected and x `[T, C]`."""
        # [T, Hk * D] -> [T, Hk, D]
        k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.key, self.value))
        if self.key_convolution is not None:
            assert inputs.key_convolution is not None, "this model's sequences come with a planned convolution"
            # [Hk * D, taps] -> [taps, Hk, D]
            taps = self.key_convolution.weight.t().unflatten(1, (-1, self.head_dim))
            k = _convolve(inputs.key_convolution, k, taps)
        # [T, Hq, D], [T, Hk, D]
        q, k = rotate_queries_and_keys(self.query_norm(q), self.key_norm(k), inputs.cos, inputs.sin)
        return _attend(inputs.attention, q, k, v, x, self.router)


class GatedRecurrence(nn.Module):
    """out(sigmoid(gate(x)) * norm(o)), o of the recurrence of SiLU(query(x)), SiLU(key(x)), SiLU(value(x)).

    MiniMax-01, arXiv 2501.08313, section 2.2, and its published code. Only the decay encodes order: there is no RoPE.
    Sums of k v^T are not divided by sqrt(D) or by the number of terms: the norm, over all heads together, bounds them.
    Each head has its own keys and values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, inner = config.head_dim, config.heads * config.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.gate = nn.Linear(config.width, inner, bias=False)
        self.norm = RmsNorm(inner, config.norm_epsilon)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, None]:
        # [T, H * D] -> [T, H, D]
        q, k, v = (F.silu(layer(x)).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value))
        o = _attend(inputs.attention, q, k, v, x).flatten(1)  # [T, H, D] -> [T, H * D]
        return self.out(self.gate(x).sigmoid() * self.norm(o)), None  # [T, C]

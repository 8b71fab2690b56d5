"""The attention layer: projections around what a mechanism and a strategy have planned.

Legend: T local tokens of one micro-batch, C width, Hq query heads, Hk key/value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farspan.kernels.layers.rope import apply_rope
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.routing.router_logits import routing_logits
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.norm import RmsNorm


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """What an attention layer needs of the sequence; cos and sin `[T, D/2]` stay float32 whatever the compute dtype.

    real: which tokens are no padding, bool `[T]`.
    """

    real: Tensor
    cos: Tensor
    sin: Tensor
    attend: DistributedAttention
    key_convolution: KeyConvolution | None


class Router(nn.Linear):
    """What a mechanism chooses by: numbers for each token and KV head, in the accumulation dtype."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        heads = config.projected_heads_of(mechanism).kv
        super().__init__(config.width, heads * mechanism.routing_width, bias=False)
        self.kv_heads, self.detached = heads, mechanism.routing_reads_detached

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach() if self.detached else input
        return routing_logits(x, self.weight).unflatten(-1, (self.kv_heads, -1))


class ConvolutionWeight(nn.Module):
    """The taps of the convolution on keys, `[Hk * D, W]`: many rows, which sharding deals evenly."""

    def __init__(self, keys_width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(keys_width, taps))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): the only place where the model meets mechanism and strategy.

    Keys are convolved as projected. Before their norm, so that it still bounds the scores. Before they are rotated, so
    that scores still depend on distances only: what SiLU gives of rotated keys depends on where they are. Where the
    paper has it is not known to us.
    """

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__()
        self.head_dim, heads = config.head_dim, config.projected_heads_of(mechanism)
        query_width, kv_width = heads.query * config.head_dim, heads.kv * config.head_dim
        self.query = nn.Linear(config.width, query_width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(query_width, config.width, bias=False)
        self.query_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.key_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.router = Router(config, mechanism) if mechanism.routing_width else None
        self.key_convolution = ConvolutionWeight(kv_width, config.key_convolution) if config.key_convolution else None

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return `[T, C]` of x `[T, C]`."""
        q = self.query(x).unflatten(-1, (-1, self.head_dim))
        return self.out(self.attend(q, x, inputs).flatten(1))

    def attend(self, q: Tensor, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return what queries `[T, Hq, D]`, as projected, find in the layer's input x `[T, C]`; `[T, Hq, D]`."""
        k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.key, self.value))
        if self.key_convolution is not None:
            assert inputs.key_convolution is not None, "this model's sequences come with a planned convolution"
            k = inputs.key_convolution(k, self.key_convolution.weight.t().unflatten(1, (-1, self.head_dim)))
        q = apply_rope(self.query_norm(q), inputs.cos, inputs.sin)  # [T, Hq, D]
        k = apply_rope(self.key_norm(k), inputs.cos, inputs.sin)  # [T, Hk, D]
        routing = () if self.router is None else (self.router(x),)  # [T, Hk, routing_width]
        return inputs.attend(q, k, v, *routing)

"""The decoder: embeddings, pre-norm blocks of grouped-query attention and SwiGLU, and the loss head.

Legend: T local tokens of one micro-batch, C width, Hq query heads, Hk key/value heads, D head size, V vocabulary.
Tensors are flat over tokens: a batch is one sequence of packed documents, told apart by its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farspan.kernels.cross_entropy import linear_cross_entropy
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.norm import rms_norm
from farspan.kernels.rope import apply_rope, attention_factor_of, inverse_frequencies, rotation_table
from farspan.kernels.routing import routing_logits
from farspan.kernels.rows import Rows
from farspan.parallel.capacity import SharedSequence
from farspan.parallel.comm import Channel
from farspan.parallel.key_convolution import KeyConvolution
from farspan.parallel.strategy import Attend
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import ExpertFeedForward, ExpertStatistics


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """sequence: who shares it, and which of its tokens are here. channel: of the ranks that hold the experts."""

    sequence: SharedSequence
    channel: Channel


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceContext:
    """What the layers need to know of the sequence beside its tokens.

    rows: of this rank's tokens. attends: attention of each layer over the whole sequence, for these rows.
    key_convolution: the same of the convolution on keys, for a model that has it. experts: for a model that has these.
    """

    rows: Rows
    attends: tuple[Attend, ...]
    key_convolution: KeyConvolution | None = None
    experts: ExpertPlaces | None = None


class Output(NamedTuple):
    """losses `[T]` in nats, float32 or float64; 0 where a label is ignored. experts: of each layer that has them."""

    losses: Tensor
    experts: tuple[ExpertStatistics, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _BlockInputs:
    """cos and sin `[T, D/2]` stay float32 whatever the compute dtype."""

    cos: Tensor
    sin: Tensor
    attend: Attend
    key_convolution: KeyConvolution | None
    experts: ExpertPlaces | None


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Router(nn.Linear):
    """What a mechanism chooses by: numbers for each token and KV head, in the accumulation dtype."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__(config.width, config.kv_heads * mechanism.routing_width, bias=False)
        self.kv_heads, self.detached = config.kv_heads, mechanism.routing_reads_detached

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach() if self.detached else input
        return routing_logits(x, self.weight).unflatten(-1, (self.kv_heads, -1))


class ConvolutionWeight(nn.Module):
    """The taps of the convolution on keys, `[Hk * D, W]`: many rows, which sharding deals evenly."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.kv_heads * config.head_dim, config.key_convolution))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): the only place where the model meets mechanism and strategy.

    Keys are convolved as projected. Before their norm, so that it still bounds the scores. Before they are rotated, so
    that scores still depend on distances only: what SiLU gives of rotated keys depends on where they are. Where the
    paper has it is not known to us.
    """

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.width, query_width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(query_width, config.width, bias=False)
        self.query_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.key_norm = RmsNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.router = Router(config, mechanism) if mechanism.routing_width else None
        self.key_convolution = ConvolutionWeight(config) if config.key_convolution else None

    def forward(self, x: Tensor, inputs: _BlockInputs) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value))
        if self.key_convolution is not None:
            assert inputs.key_convolution is not None, "this model's sequences come with a planned convolution"
            k = inputs.key_convolution(k, self.key_convolution.weight.t().unflatten(1, (-1, self.head_dim)))
        q = apply_rope(self.query_norm(q), inputs.cos, inputs.sin)  # [T, Hq, D]
        k = apply_rope(self.key_norm(k), inputs.cos, inputs.sin)  # [T, Hk, D]
        routing = () if self.router is None else (self.router(x),)  # [T, Hk, routing_width]
        return self.out(inputs.attend(q, k, v, *routing).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer; with `recompute` its activations are computed again in the backward pass instead of kept."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism, *, has_experts: bool, recompute: bool) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, mechanism)
        self.feed_forward_norm = RmsNorm(config.width, config.norm_epsilon)
        self.feed_forward = _experts(config) if has_experts else FeedForward(config.width, config.feed_forward)
        self.recompute = recompute

    def forward(self, x: Tensor, inputs: _BlockInputs) -> tuple[Tensor, ExpertStatistics | None]:
        # What is computed again is thrown away but for gradients: loads are counted, and losses added, once.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, inputs, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, inputs)

    def _layer(self, x: Tensor, inputs: _BlockInputs) -> tuple[Tensor, ExpertStatistics | None]:
        x = x + self.attention(self.attention_norm(x), inputs)
        normed = self.feed_forward_norm(x)
        if not isinstance(self.feed_forward, ExpertFeedForward):
            return x + self.feed_forward(normed), None
        assert inputs.experts is not None, "this model's sequences come with the places of its experts"
        out, statistics = self.feed_forward(normed, inputs.experts.sequence, inputs.experts.channel)
        return x + out, statistics


def _experts(config: ModelConfig) -> ExpertFeedForward:
    shared = FeedForward(config.width, config.experts.shared) if config.experts.shared else None
    return ExpertFeedForward(config, shared)


class Transformer(nn.Module):
    """Tokens and labels in, the loss of each token out; `mechanisms` are those of the layers."""

    def __init__(self, config: ModelConfig, mechanisms: Sequence[Mechanism], *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, mechanism, has_experts=has_experts, recompute=recompute)
            for mechanism, has_experts in zip(mechanisms, config.expert_layers, strict=True)
        )
        self.norm = RmsNorm(config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor, context: SequenceContext) -> Output:
        """tokens and labels are int64 `[T]`."""
        x = self.embedding(tokens)  # [T, C]
        cos, sin = self._rotation(context.rows.position, x.dtype)
        experts: list[ExpertStatistics] = []
        for block, attend in zip(self.blocks, context.attends, strict=True):
            x, statistics = block(x, _BlockInputs(cos, sin, attend, context.key_convolution, context.experts))
            experts += [] if statistics is None else [statistics]
        return Output(linear_cross_entropy(self.norm(x), self.head.weight, labels), tuple(experts))

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope = self.config.rope
        frequencies = inverse_frequencies(self.config.head_dim, rope.base, rope.build_scaling())
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        factor = attention_factor_of(rope.build_scaling())
        return rotation_table(position, frequencies.to(position.device), factor, dtype)

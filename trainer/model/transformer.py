"""The decoder: embeddings, pre-norm blocks of grouped-query attention and SwiGLU, and the loss head.

Legend: T local tokens of one micro-batch, C width, D head dim.
Tensors are flat over tokens: a batch is one sequence of packed documents; its rows say which document each token is in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farspan.kernels.layers.cross_entropy import linear_cross_entropy
from farspan.kernels.layers.rope import attention_factor_of, inverse_frequencies, rotation_table
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.trainer.model.attention import Attention, AttentionInputs, GatedRecurrence, RmsNorm
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import ExpertFeedForward, RoutingStatistics
from farspan.trainer.model.head_mixture import HeadMixture

Layer = TypeVar("Layer", bound=nn.Module)
BlockOutput = tuple[Tensor, RoutingStatistics | None, RoutingStatistics | None]
"""Residual stream `[T, C]`; statistics of experts and of heads, if the block has a router for them."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """sequence: its ranks and the local tokens of it. channel: to the ranks that own the experts."""

    sequence: ExpertCapacity
    channel: Channel


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceContext:
    """What the layers need to know of the sequence beside its tokens.

    rows: of the local tokens. attention: of each layer, planned over the full sequence for these rows.
    key_convolution: planned likewise, for a model that has it. experts: for a model that has experts.
    """

    rows: Rows
    attention: tuple[DistributedAttention, ...]
    key_convolution: KeyConvolution | None = None
    experts: ExpertPlaces | None = None


class Output(NamedTuple):
    """losses `[T]` in nats, float32 or float64; 0 where a label is ignored. experts, heads: of layers with a router."""

    losses: Tensor
    experts: tuple[RoutingStatistics, ...]
    heads: tuple[RoutingStatistics, ...]


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
    """Attention, then SwiGLU or experts; with `recompute`, activations are recomputed in the backward pass.

    In a parallel block both read the same norm, and the exchange of rows with experts overlaps attention.
    """

    def __init__(self, config: ModelConfig, mechanism: Mechanism, *, has_experts: bool, recompute: bool) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.width, config.norm_epsilon)
        if config.is_gated(mechanism):
            self.attention = GatedRecurrence(config)
        else:
            self.attention = (HeadMixture if config.mixes_heads(mechanism) else Attention)(config, mechanism)
        self.feed_forward_norm = None if config.parallel_blocks else RmsNorm(config.width, config.norm_epsilon)
        if has_experts:
            shared = FeedForward(config.width, config.experts.shared) if config.experts.shared else None
            self.feed_forward = ExpertFeedForward(config, shared)
        else:
            self.feed_forward = FeedForward(config.width, config.feed_forward)
        self.recompute = recompute

    def forward(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> BlockOutput:
        # The outputs of the recomputation are discarded, so that loads are counted, and losses added, once.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, inputs, experts, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, inputs, experts)

    def _layer(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> BlockOutput:
        normed = self.attention_norm(x)
        if self.feed_forward_norm is None:
            # Start the exchange with experts, compute attention meanwhile, then wait for the experts.
            wait = self._start_feed_forward(normed, experts)
            attention_out, of_heads = self.attention(normed, inputs)
            feed_forward_out, of_experts = wait()
            return x + attention_out + feed_forward_out, of_experts, of_heads
        attention_out, of_heads = self.attention(normed, inputs)
        x = x + attention_out
        feed_forward_out, of_experts = self._start_feed_forward(self.feed_forward_norm(x), experts)()
        return x + feed_forward_out, of_experts, of_heads

    def _start_feed_forward(
        self, normed: Tensor, experts: ExpertPlaces | None
    ) -> Callable[[], tuple[Tensor, RoutingStatistics | None]]:
        if not isinstance(self.feed_forward, ExpertFeedForward):
            return lambda: (self.feed_forward(normed), None)
        assert experts is not None, "this model's sequences come with the places of its experts"
        return self.feed_forward.begin(normed, experts.sequence, experts.channel)


class Transformer(nn.Module):
    """Tokens and labels in, the loss of each token out; `mechanisms`: one for each layer."""

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
        """tokens, labels: int64 `[T]`."""
        real = context.rows.document >= 0
        # Padding is 0 in all layers, whatever its token: 0 x NaN would reach the gradients of weights.
        x = self.embedding(tokens).masked_fill(~real[:, None], 0.0)  # [T, C]
        cos, sin = self._rotation(context.rows.position, x.dtype)  # [T, D/2]
        experts, heads = [], []
        for block, attention in zip(self.blocks, context.attention, strict=True):
            inputs = AttentionInputs(real, cos, sin, attention, context.key_convolution)
            x, of_experts, of_heads = block(x, inputs, context.experts)
            experts += [of_experts] if of_experts is not None else []
            heads += [of_heads] if of_heads is not None else []
        losses = linear_cross_entropy(self.norm(x), self.head.weight, labels)
        return Output(losses, tuple(experts), tuple(heads))

    def layers_of(self, kind: type[Layer]) -> list[Layer]:
        """Return the modules of this class, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, kind)]

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope = self.config.rope
        frequencies = inverse_frequencies(rope.rotated or self.config.head_dim, rope.base, rope.build_scaling())
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        factor = attention_factor_of(rope.build_scaling())
        return rotation_table(position, frequencies.to(position.device), factor, dtype)

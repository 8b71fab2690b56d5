"""The decoder: embeddings, pre-norm blocks of grouped-query attention and SwiGLU, and the loss head.

Legend: T local tokens of one micro-batch, C width, Hq query heads, Hk key/value heads, D head size, V vocabulary.
Tensors are flat over tokens: a batch is one sequence of packed documents, told apart by its rows.
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
from farspan.trainer.model.attention import Attention, AttentionInputs
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import ExpertFeedForward
from farspan.trainer.model.gated_recurrence import GatedRecurrence
from farspan.trainer.model.head_mixture import HeadMixture
from farspan.trainer.model.norm import RmsNorm
from farspan.trainer.model.statistics import RoutingStatistics

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """sequence: who shares it, and which of its tokens are here. channel: of the ranks that hold the experts."""

    sequence: ExpertCapacity
    channel: Channel


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceContext:
    """What the layers need to know of the sequence beside its tokens.

    rows: of this rank's tokens. attends: attention of each layer over the whole sequence, for these rows.
    key_convolution: the same of the convolution on keys, for a model that has it. experts: for a model that has these.
    """

    rows: Rows
    attends: tuple[DistributedAttention, ...]
    key_convolution: KeyConvolution | None = None
    experts: ExpertPlaces | None = None


class Output(NamedTuple):
    """losses `[T]` in nats, float32 or float64; 0 where a label is ignored. experts, heads: of layers that choose."""

    losses: Tensor
    experts: tuple[RoutingStatistics, ...]
    heads: tuple[RoutingStatistics, ...]


class _BlockOutput(NamedTuple):
    x: Tensor
    experts: RoutingStatistics | None
    heads: RoutingStatistics | None


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
    """One layer; with `recompute` its activations are computed again in the backward pass instead of kept.

    Attention, then SwiGLU or experts; where blocks are parallel both read the same norm, and rows travel to experts
    during attention.
    """

    def __init__(self, config: ModelConfig, mechanism: Mechanism, *, has_experts: bool, recompute: bool) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.width, config.norm_epsilon)
        self.attention = _attention(config, mechanism)
        self.feed_forward_norm = None if config.parallel_blocks else RmsNorm(config.width, config.norm_epsilon)
        self.feed_forward = _experts(config) if has_experts else FeedForward(config.width, config.feed_forward)
        self.recompute = recompute

    def forward(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> _BlockOutput:
        # What is computed again is thrown away but for gradients: loads are counted, and losses added, once.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, inputs, experts, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x, inputs, experts)

    def _layer(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> _BlockOutput:
        normed = self.attention_norm(x)
        if self.feed_forward_norm is None:
            finish = self._begin_to_feed(normed, experts)
            attended, of_heads = self._attend(normed, inputs)
            fed, of_experts = finish()
            return _BlockOutput(x + attended + fed, of_experts, of_heads)
        attended, of_heads = self._attend(normed, inputs)
        x = x + attended
        fed, of_experts = self._begin_to_feed(self.feed_forward_norm(x), experts)()
        return _BlockOutput(x + fed, of_experts, of_heads)

    def _attend(self, normed: Tensor, inputs: AttentionInputs) -> tuple[Tensor, RoutingStatistics | None]:
        if isinstance(self.attention, HeadMixture):
            return self.attention.mix(normed, inputs)
        return self.attention(normed, inputs), None

    def _begin_to_feed(
        self, normed: Tensor, experts: ExpertPlaces | None
    ) -> Callable[[], tuple[Tensor, RoutingStatistics | None]]:
        if not isinstance(self.feed_forward, ExpertFeedForward):
            return lambda: (self.feed_forward(normed), None)
        assert experts is not None, "this model's sequences come with the places of its experts"
        return self.feed_forward.begin(normed, experts.sequence, experts.channel)


def _attention(config: ModelConfig, mechanism: Mechanism) -> Attention | GatedRecurrence:
    if config.is_gated(mechanism):
        return GatedRecurrence(config)
    return (HeadMixture if config.mixes_heads(mechanism) else Attention)(config, mechanism)


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
        real = context.rows.document >= 0
        experts, heads = [], []
        for block, attend in zip(self.blocks, context.attends, strict=True):
            made = block(x, AttentionInputs(real, cos, sin, attend, context.key_convolution), context.experts)
            x = made.x
            experts += [made.experts] if made.experts is not None else []
            heads += [made.heads] if made.heads is not None else []
        losses = linear_cross_entropy(self.norm(x), self.head.weight, labels)
        return Output(losses, tuple(experts), tuple(heads))

    def layers_of(self, kind: type[Layer]) -> list[Layer]:
        """Return the parts of blocks that are of this kind, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, kind)]

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope = self.config.rope
        frequencies = inverse_frequencies(rope.rotated or self.config.head_dim, rope.base, rope.build_scaling())
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        factor = attention_factor_of(rope.build_scaling())
        return rotation_table(position, frequencies.to(position.device), factor, dtype)

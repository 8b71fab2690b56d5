"""The decoder: embeddings, pre-norm blocks of grouped-query attention and SwiGLU, and the loss head.

Legend: T local tokens of one micro-batch, C width, D head dim.
Tensors are flat over tokens: a batch is one sequence of packed documents; its rows say which document each token is in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farspan.kernels.layers.cross_entropy import linear_cross_entropy
from farspan.kernels.layers.rope import attention_factor_of, inverse_frequencies_on, rotation_table
from farspan.kernels.layers.swiglu import silu_product
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.recomputation import choices_of_two_passes
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.eager import eager
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.trainer.model.attention import Attention, AttentionInputs, GatedRecurrence, RmsNorm
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import ExpertFeedForward, RoutingStatistics
from farspan.trainer.model.head_mixture import HeadMixture

Layer = TypeVar("Layer", bound=nn.Module)
UnderWay = Callable[[], tuple[Tensor, RoutingStatistics]]
"""What waits for the experts of tokens."""
BlockOutput = tuple[Tensor, RoutingStatistics | None, RoutingStatistics | None]
"""Residual stream `[T, C]`; statistics of experts and of heads, if the block has a router for them."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlaces:
    """sequence: its ranks and the local tokens of it. channel: to the ranks that own the experts."""

    sequence: ExpertCapacity
    channel: Channel


class SequenceContext:
    """What the layers need to know of the sequence beside its tokens.

    rows: of the local tokens. attention: of each layer, planned over the full sequence for these rows.
    key_convolution: planned likewise, for a model that has it. experts: for a model that has experts.
    """

    # No dataclass, as FSDP walks through the fields of those at every call, here through all plans.
    def __init__(
        self,
        *,
        rows: Rows,
        attention: tuple[DistributedAttention, ...],
        key_convolution: KeyConvolution | None = None,
        experts: ExpertPlaces | None = None,
    ) -> None:
        self.rows, self.attention, self.key_convolution, self.experts = rows, attention, key_convolution, experts


class Output(NamedTuple):
    """losses `[T]` in nats, float32 or float64; 0 where a label is ignored, empty without labels.

    experts, heads: of layers with a router.
    """

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
        return self.down(silu_product(self.gate(x), self.up(x)))


class Block(nn.Module):
    """Attention, then SwiGLU or experts; with `recompute`, activations are recomputed in the backward pass.

    In a parallel block both read the same norm, and the exchange of rows with experts overlaps attention. `compiled`:
    by torch.compile, but for attention, key convolution, mixtures of heads and experts, between which a block falls
    into graphs.
    """

    def __init__(
        self, config: ModelConfig, mechanism: Mechanism, *, has_experts: bool, recompute: bool, compiled: bool = False
    ) -> None:
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
        self.compute = torch.compile(self._compute) if compiled else self._compute

    def forward(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> BlockOutput:
        # The outputs of the recomputation are discarded, so that loads are counted, and losses added, once. What the
        # first pass chose by content serves it.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self.compute, x, inputs, experts,
                use_reentrant=False, preserve_rng_state=False, context_fn=choices_of_two_passes,
            )  # fmt: skip
        return self.compute(x, inputs, experts)

    def _compute(self, x: Tensor, inputs: AttentionInputs, experts: ExpertPlaces | None) -> BlockOutput:
        x, normed = self.attention_norm.of_residual(x)
        if self.feed_forward_norm is None:
            # Start the exchange with experts, compute attention meanwhile, then wait for the experts.
            under_way = self._start_experts(normed, experts)
            attention_out, of_heads = self.attention(normed, inputs)
            feed_forward_out, of_experts = self._feed_forward(normed, under_way)
            return x + attention_out + feed_forward_out, of_experts, of_heads
        attention_out, of_heads = self.attention(normed, inputs)
        x, normed = self.feed_forward_norm.of_residual(x, attention_out)
        feed_forward_out, of_experts = self._feed_forward(normed, self._start_experts(normed, experts))
        return x + feed_forward_out, of_experts, of_heads

    def _start_experts(self, normed: Tensor, experts: ExpertPlaces | None) -> UnderWay | None:
        if not isinstance(self.feed_forward, ExpertFeedForward):
            return None
        assert experts is not None, "this model's sequences come with the places of its experts"
        return self.feed_forward.begin(normed, experts.sequence, experts.channel)

    def _feed_forward(self, normed: Tensor, under_way: UnderWay | None) -> tuple[Tensor, RoutingStatistics | None]:
        return (self.feed_forward(normed), None) if under_way is None else _finish(under_way)


@eager
def _finish(under_way: UnderWay) -> tuple[Tensor, RoutingStatistics]:
    return under_way()


class Transformer(nn.Module):
    """Tokens and labels in, the loss of each token out; `mechanisms`: one for each layer."""

    def __init__(
        self, config: ModelConfig, mechanisms: Sequence[Mechanism], *, recompute: bool = False, compiled: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        if compiled:
            # All blocks share their code, for which torch counts compilations: of each kind of block, and of training
            # and evaluation. Beyond its limit of 8 blocks would silently run as they are.
            torch._dynamo.config.recompile_limit = 64
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, mechanism, has_experts=has_experts, recompute=recompute, compiled=compiled)
            for mechanism, has_experts in zip(mechanisms, config.expert_layers, strict=True)
        )
        self.norm = RmsNorm(config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor | None, context: SequenceContext) -> Output:
        """tokens, labels: int64 `[T]`; without labels the layers run for their statistics alone."""
        x, experts, heads = self._run_blocks(tokens, context)
        if labels is None:
            return Output(x.new_empty(0), experts, heads)
        return Output(linear_cross_entropy(self.norm(x), self.head.weight, labels), experts, heads)

    def hidden_states(self, tokens: Tensor, context: SequenceContext) -> Tensor:
        """Return what the head reads of tokens `[T]`, `[T, C]`."""
        return self.norm(self._run_blocks(tokens, context)[0])

    def _run_blocks(
        self, tokens: Tensor, context: SequenceContext
    ) -> tuple[Tensor, tuple[RoutingStatistics, ...], tuple[RoutingStatistics, ...]]:
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
        return x, tuple(experts), tuple(heads)

    def layers_of(self, kind: type[Layer]) -> list[Layer]:
        """Return the modules of this class, in the order of the blocks."""
        return [module for module in self.modules() if isinstance(module, kind)]

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope, rotated = self.config.rope, self.config.rope.rotated or self.config.head_dim
        frequencies = inverse_frequencies_on(position.device, rotated, rope.base, rope.build_scaling())
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        factor = attention_factor_of(rope.build_scaling())
        return rotation_table(position, frequencies, factor, dtype)

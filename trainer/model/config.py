"""What a decoder is made of."""

from dataclasses import dataclass, field
from typing import Literal

from farspan.errors import ConfigError
from farspan.kernels.layers.rope import Llama3Scaling, RopeScaling, YarnScaling
from farspan.kernels.mechanism import Access, Heads, Mechanism
from farspan.kernels.moe.expert_router import ExpertRouter
from farspan.kernels.moe.head_router import AttentionExperts, MixtureOfHeads
from farspan.trainer.toml_config import bounded, parse_pattern


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the fields after `scaling` matter only to the scalings that have them.

    base: longest wavelength is 2 pi base. rotated: how many numbers of each head turn, the first ones, 0 for all; what
    scalings call the head's size is then this. scaling: how frequencies are stretched over a longer context.
    factor: how many times longer than `original_positions` the context is. original_positions: the context that the
    frequencies were made for. low_frequency_factor, high_frequency_factor: of Llama 3, in turns over
    `original_positions`; beta_fast, beta_slow: of YaRN, in turns over `original_positions`.
    """

    base: float = bounded(10_000.0, above=1)
    rotated: int = bounded(0, minimum=0)
    scaling: Literal["none", "llama3", "yarn"] = "none"
    factor: float = bounded(1.0, minimum=1)
    original_positions: int = bounded(8192, minimum=1)
    low_frequency_factor: float = bounded(1.0, above=0)
    high_frequency_factor: float = bounded(4.0, above=0)
    beta_fast: float = bounded(32.0, above=0)
    beta_slow: float = bounded(1.0, above=0)

    def build_scaling(self) -> RopeScaling | None:
        """Return the scaling that these fields describe."""
        if self.scaling == "llama3":
            return Llama3Scaling(
                factor=self.factor,
                low_freq_factor=self.low_frequency_factor,
                high_freq_factor=self.high_frequency_factor,
                original_positions=self.original_positions,
            )
        if self.scaling == "yarn":
            return YarnScaling(
                factor=self.factor,
                original_positions=self.original_positions,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
            )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Mixtures of experts in place of the feed-forward layer; every token is computed by the experts that it chose.

    count: experts of a layer, 0 without any. per_token: how many each token chooses. feed_forward: inner size of each.
    shared: inner size of one more, which computes all tokens; 0 without. layers: which layers have experts, by a
    pattern that is repeated, of `experts` and `dense`, such as 'dense, experts*3'. choice: who chooses; where experts
    choose tokens (arXiv 2202.09368), they look at the whole sequence, the future too: not for generating text.
    capacity: how many times its even share of a sequence an expert takes at most, 0 for any; the rest of the choices is
    dropped. drop: which, those of the lowest weights or of the last positions. score: of an expert for a token,
    softmax over all experts, or sigmoid. normalized: whether weights of the chosen ones add up to 1, before scale.
    scale: of the weights. groups: of neighboring experts. groups_per_token: how many of these, the best, a token
    chooses from. bias_rate: how far the bias of an expert moves each step to even out loads; it counts in the choice
    only (arXiv 2408.15664). balance_loss: coefficient of Switch's loss. balance_over: what that is computed over, each
    sequence or all of the step. z_loss: coefficient of the squared log-sum-exps of logits.
    """

    count: int = bounded(0, minimum=0)
    per_token: int = bounded(2, minimum=1)
    feed_forward: int = bounded(0, minimum=0)
    shared: int = bounded(0, minimum=0)
    layers: str = "experts"
    choice: Literal["tokens", "experts"] = "tokens"
    capacity: float = bounded(0.0, minimum=0)
    drop: Literal["weight", "position"] = "weight"
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = bounded(1.0, above=0)
    groups: int = bounded(1, minimum=1)
    groups_per_token: int = bounded(1, minimum=1)
    bias_rate: float = bounded(0.0, minimum=0)
    balance_loss: float = bounded(0.0, minimum=0)
    balance_over: Literal["sequence", "step"] = "sequence"
    z_loss: float = bounded(0.0, minimum=0)

    def build_router(self) -> ExpertRouter:
        """Return how experts are chosen; raises ValueError where the fields do not fit."""
        return ExpertRouter(
            experts=self.count,
            per_token=self.per_token,
            score=self.score,
            normalized=self.normalized,
            scale=self.scale,
            groups=self.groups,
            groups_per_token=self.groups_per_token,
        )

    def in_layers(self, layers: int) -> tuple[bool, ...]:
        """Return whether each layer has experts; raises ConfigError for a pattern that is none."""
        if not self.count:
            return (False,) * layers
        pattern = parse_pattern(self.layers, "model.experts.layers")
        for name in pattern:
            if name not in ("experts", "dense"):
                raise ConfigError(f"model.experts.layers={self.layers!r} has {name!r}: layers are experts or dense.")
        return tuple(pattern[layer % len(pattern)] == "experts" for layer in range(layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMixtureConfig:
    """Mixtures of attention: tokens choose whose queries and outputs they use; any mechanism attends with these.

    kind: experts, each with `model.heads` queries and an output of its own (arXiv 2210.05144), or heads, some of
    `model.heads` (MoH, arXiv 2410.11842). count: of experts. per_token: how many experts a token chooses or, of heads,
    how many for each KV head. shared: heads of each KV head that work on every token besides. own_keys: whether each
    expert has keys and values of its own, too (BAM, arXiv 2408.08274); tokens have to choose all experts then, as their
    keys are there for other tokens. normalized: whether weights of the chosen experts add up to 1. bias_rate,
    balance_loss, balance_over, z_loss: as in `model.experts`.
    """

    kind: Literal["none", "experts", "heads"] = "none"
    count: int = bounded(0, minimum=0)
    per_token: int = bounded(1, minimum=1)
    shared: int = bounded(0, minimum=0)
    own_keys: bool = False
    normalized: bool = True
    bias_rate: float = bounded(0.0, minimum=0)
    balance_loss: float = bounded(0.0, minimum=0)
    balance_over: Literal["sequence", "step"] = "sequence"
    z_loss: float = bounded(0.0, minimum=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder with grouped-query attention and SwiGLU.

    layers: blocks of attention and SwiGLU. width: size of the residual stream. heads: of queries. kv_heads: of keys
    and values, each shared by heads / kv_heads query heads. head_dim: size of a head; heads * head_dim need not be
    the width. feed_forward: inner size of SwiGLU. vocabulary_size: of the model; 0 takes the data's, rounded up to a
    multiple of 64. norm_epsilon: of every RMSNorm. qk_norm: normalize the queries and keys of each head.
    tied_embeddings: one table for input and output. key_convolution: how many keys a short convolution on the
    keys reads, 0 without one (FlashMoBA, arXiv 2511.11571). parallel_blocks: whether attention and SwiGLU of a block
    read the same norm and are added together, instead of one after the other. recurrent_layer: what a recurrence is
    wrapped in, `plain` the same as all other mechanisms, `gated` as in MiniMax-01 (arXiv 2501.08313, section 2.2), SiLU
    of queries, keys and values, as many heads of each, without rotary embedding, qk_norm and key_convolution, and
    behind it a norm over all heads and a gate. experts: of layers that have a mixture instead of SwiGLU. head_mixture:
    of attention, in all layers but gated ones.
    """

    layers: int = bounded(minimum=1)
    width: int = bounded(minimum=1)
    heads: int = bounded(minimum=1)
    kv_heads: int = bounded(minimum=1)
    head_dim: int = bounded(minimum=2)
    feed_forward: int = bounded(minimum=1)
    vocabulary_size: int = bounded(0, minimum=0)
    norm_epsilon: float = bounded(1e-5, above=0)
    qk_norm: bool = False
    tied_embeddings: bool = False
    key_convolution: Literal[0, 3, 5] = 0
    parallel_blocks: bool = False
    recurrent_layer: Literal["plain", "gated"] = "plain"
    rope: RopeConfig = field(default_factory=RopeConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    head_mixture: HeadMixtureConfig = field(default_factory=HeadMixtureConfig)

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return self.experts.in_layers(self.layers)

    def is_gated(self, mechanism: Mechanism) -> bool:
        """Return whether a layer with this mechanism is a gated recurrence."""
        return self.recurrent_layer == "gated" and mechanism.accesses == {Access.STATE}

    def mixes_heads(self, mechanism: Mechanism) -> bool:
        """Return whether tokens choose heads in a layer with this mechanism."""
        return self.head_mixture.kind != "none" and not self.is_gated(mechanism)

    def projected_heads_of(self, mechanism: Mechanism) -> Heads:
        """Return how many heads a layer with this mechanism has matrices for; a gated recurrence shares none."""
        if self.is_gated(mechanism):
            return Heads(query=self.heads, kv=self.heads)
        mixture = self.head_mixture
        copies = mixture.count if mixture.kind == "experts" else 1
        return Heads(query=copies * self.heads, kv=self.kv_heads * (copies if mixture.own_keys else 1))

    def heads_of(self, mechanism: Mechanism) -> Heads:
        """Return how many heads each token works with in a layer with this mechanism: those of its attention."""
        projected, mixture = self.projected_heads_of(mechanism), self.head_mixture
        if not self.mixes_heads(mechanism):
            return projected
        if mixture.kind == "experts":
            return Heads(query=mixture.per_token * self.heads, kv=projected.kv)
        return Heads(query=projected.kv * (mixture.shared + mixture.per_token), kv=projected.kv)

    def build_head_router(self) -> AttentionExperts | MixtureOfHeads | None:
        """Return how heads are chosen, None without a mixture; raises ValueError where the fields do not fit."""
        mixture = self.head_mixture
        if mixture.kind == "experts":
            return AttentionExperts(count=mixture.count, per_token=mixture.per_token, normalized=mixture.normalized)
        if mixture.kind == "heads":
            return MixtureOfHeads(
                kv_heads=self.kv_heads,
                group=self.heads // self.kv_heads,
                shared=mixture.shared,
                per_token=mixture.per_token,
            )
        return None

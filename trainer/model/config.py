"""The configuration of a decoder; the string under each field is its line in docs/configuration.md."""

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
    """Rotary position embedding (RoPE)."""

    base: float = bounded(10_000.0, above=1)
    """Base of the wavelengths; the longest is 2 pi base tokens."""
    rotated: int = bounded(0, minimum=0)
    """How many dimensions of each head rotate, the first ones; 0 rotates all. Scalings take this for the head size."""
    scaling: Literal["none", "llama3", "yarn"] = "none"
    """How frequencies are scaled to a longer context."""
    factor: float = bounded(1.0, minimum=1)
    """Ratio of the context length to `original_positions`; for llama3 and yarn."""
    original_positions: int = bounded(8192, minimum=1)
    """Context length that the frequencies were made for; for llama3 and yarn."""
    low_frequency_factor: float = bounded(1.0, above=0)
    """llama3: fewer turns over `original_positions` than this scale by the full factor."""
    high_frequency_factor: float = bounded(4.0, above=0)
    """llama3: more turns over `original_positions` than this stay unscaled."""
    beta_fast: float = bounded(32.0, above=0)
    """yarn: more turns over `original_positions` than this stay unscaled."""
    beta_slow: float = bounded(1.0, above=0)
    """yarn: fewer turns over `original_positions` than this scale by the full factor."""

    def build_scaling(self) -> RopeScaling | None:
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
    """Mixture of experts (MoE) in place of the feed-forward layer."""

    count: int = bounded(0, minimum=0)
    """Experts of a layer; 0 makes every layer dense."""
    per_token: int = bounded(2, minimum=1)
    """Experts that each token is routed to."""
    feed_forward: int = bounded(0, minimum=0)
    """Inner size of each expert."""
    shared: int = bounded(0, minimum=0)
    """Inner size of one more expert, which computes all tokens; 0 leaves it out."""
    layers: str = "experts"
    """Which layers have experts: a pattern of `experts` and `dense` that repeats, such as 'dense, experts*3'."""
    choice: Literal["tokens", "experts"] = "tokens"
    """Who chooses. Experts that choose tokens (arXiv 2202.09368) see the full sequence: such a model cannot generate
    text token by token."""
    capacity: float = bounded(0.0, minimum=0)
    """Most tokens of a sequence that an expert takes, as a multiple of its even share; 0 sets no limit."""
    drop: Literal["weight", "position"] = "weight"
    """Which tokens an expert over its capacity drops: those of the lowest weights or of the last positions."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score of an expert for a token: softmax over all experts, or sigmoid."""
    normalized: bool = True
    """Whether the weights of the chosen experts add up to 1, before `scale`; false where each token chooses one."""
    scale: float = bounded(1.0, above=0)
    """Factor of the weights."""
    groups: int = bounded(1, minimum=1)
    """Number of groups that neighboring experts form."""
    groups_per_token: int = bounded(1, minimum=1)
    """Groups, the best ones, that a token chooses its experts from."""
    group_score_top_k: int = bounded(0, minimum=0)
    """How many of a group's best experts add up to its score: 2 as in DeepSeek-V3's code and torchtitan, 1 (the best)
    as in DeepSeek-V2; 0 takes per_token / groups_per_token, as DeepSeek-V3's paper and Megatron do."""
    bias_rate: float = bounded(0.0, minimum=0)
    """How far each step moves an expert's bias to even out loads; only the choice uses it (arXiv 2408.15664)."""
    balance_loss: float = bounded(0.0, minimum=0)
    """Coefficient of the load balancing loss of Switch Transformer."""
    balance_over: Literal["sequence", "step"] = "sequence"
    """Tokens that the load balancing loss is computed over. With `step` all micro-batches of a rank but the first run
    forward once more, to count the loads of the step before the first backward pass."""
    z_loss: float = bounded(0.0, minimum=0)
    """Coefficient of the router z-loss, the squared log-sum-exp of the logits."""

    def build_router(self) -> ExpertRouter:
        """Raises ValueError where the fields do not fit."""
        return ExpertRouter(
            experts=self.count,
            per_token=self.per_token,
            score=self.score,
            normalized=self.normalized,
            scale=self.scale,
            groups=self.groups,
            groups_per_token=self.groups_per_token,
            group_score_top_k=self.group_score_top_k,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMixtureConfig:
    """Mixture of attention heads: tokens choose whose queries and outputs they use, with any mechanism."""

    kind: Literal["none", "experts", "heads"] = "none"
    """What a token chooses: experts, each with `model.heads` queries and its own output (arXiv 2210.05144), or heads,
    some of `model.heads` (MoH, arXiv 2410.11842)."""
    count: int = bounded(0, minimum=0)
    """Number of experts; for kind=experts."""
    per_token: int = bounded(1, minimum=1)
    """Experts that a token chooses or, for kind=heads, heads that it chooses for each KV head."""
    shared: int = bounded(0, minimum=0)
    """Query heads of each KV head that are always active, besides; for kind=heads."""
    own_keys: bool = False
    """Whether each expert has its own keys and values, too (BAM, arXiv 2408.08274). Tokens then have to choose all
    experts, as other tokens read those keys."""
    normalized: bool = True
    """Whether the weights of the chosen experts add up to 1."""
    bias_rate: float = bounded(0.0, minimum=0)
    """As in `model.experts`."""
    balance_loss: float = bounded(0.0, minimum=0)
    """As in `model.experts`."""
    balance_over: Literal["sequence", "step"] = "sequence"
    """As in `model.experts`."""
    z_loss: float = bounded(0.0, minimum=0)
    """As in `model.experts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder with grouped-query attention and SwiGLU."""

    layers: int = bounded(minimum=1)
    """Number of blocks of attention and feed-forward."""
    width: int = bounded(minimum=1)
    """Size of the residual stream."""
    heads: int = bounded(minimum=1)
    """Number of query heads."""
    kv_heads: int = bounded(minimum=1)
    """Number of key/value heads (GQA), each shared by heads / kv_heads query heads."""
    head_dim: int = bounded(minimum=2)
    """Size of a head; heads * head_dim need not be the width."""
    feed_forward: int = bounded(minimum=1)
    """Inner size of SwiGLU."""
    vocabulary_size: int = bounded(0, minimum=0)
    """Number of tokens in the vocabulary; 0 takes the data's, rounded up to a multiple of 64."""
    norm_epsilon: float = bounded(1e-5, above=0)
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """Whether to normalize the queries and keys of each head."""
    qkv_bias: bool = False
    """Whether the projections of queries, keys and values add a bias, as in Qwen2."""
    tied_embeddings: bool = False
    """Whether input embedding and output head share one table."""
    key_convolution: Literal[0, 3, 5] = 0
    """Keys that a short causal convolution on the keys reads (FlashMoBA, arXiv 2511.11571); 0 leaves it out."""
    parallel_blocks: bool = False
    """Whether attention and feed-forward of a block read the same norm and are added together, instead of in turn."""
    recurrent_layer: Literal["plain", "gated"] = "plain"
    """Layer around a recurrence: `plain` is that of all other mechanisms; `gated` is MiniMax-01's (arXiv 2501.08313,
    section 2.2): SiLU of queries, keys and values, one KV head per query head, no RoPE, qk_norm, qkv_bias or
    key_convolution, then a norm over all heads and an output gate."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Mixture of experts."""
    head_mixture: HeadMixtureConfig = field(default_factory=HeadMixtureConfig)
    """Mixture of attention heads, in all layers but gated recurrences."""

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts; raises ConfigError for a pattern of other names."""
        if not self.experts.count:
            return (False,) * self.layers
        pattern = parse_pattern(self.experts.layers, "model.experts.layers")
        for name in pattern:
            if name not in ("experts", "dense"):
                raise ConfigError(
                    f"model.experts.layers={self.experts.layers!r} has {name!r}: layers are experts or dense."
                )
        return tuple(pattern[layer % len(pattern)] == "experts" for layer in range(self.layers))

    def is_gated(self, mechanism: Mechanism) -> bool:
        return self.recurrent_layer == "gated" and mechanism.accesses == {Access.STATE}

    def mixes_heads(self, mechanism: Mechanism) -> bool:
        return self.head_mixture.kind != "none" and not self.is_gated(mechanism)

    def projected_heads_of(self, mechanism: Mechanism) -> Heads:
        """Return the heads that a layer with this mechanism has matrices for; a gated recurrence shares no KV heads."""
        if self.is_gated(mechanism):
            return Heads(query=self.heads, kv=self.heads)
        mixture = self.head_mixture
        copies = mixture.count if mixture.kind == "experts" else 1
        return Heads(query=copies * self.heads, kv=self.kv_heads * (copies if mixture.own_keys else 1))

    def heads_of(self, mechanism: Mechanism) -> Heads:
        """Return the heads that attend for each token in a layer with this mechanism."""
        projected, mixture = self.projected_heads_of(mechanism), self.head_mixture
        if not self.mixes_heads(mechanism):
            return projected
        if mixture.kind == "experts":
            return Heads(query=mixture.per_token * self.heads, kv=projected.kv)
        return Heads(query=projected.kv * (mixture.shared + mixture.per_token), kv=projected.kv)

    def build_head_router(self) -> AttentionExperts | MixtureOfHeads | None:
        """Return None without a mixture; raises ValueError where the fields do not fit."""
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

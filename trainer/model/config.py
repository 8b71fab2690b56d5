"""What a decoder is made of."""

from dataclasses import dataclass, field
from typing import Literal

from farspan.kernels.rope import Llama3Scaling, RopeScaling, YarnScaling
from farspan.trainer.config_io import bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the fields after `scaling` matter only to the scalings that have them.

    base: longest wavelength is 2 pi base. scaling: how frequencies are stretched over a longer context.
    factor: how many times longer than `original_positions` the context is. original_positions: the context that the
    frequencies were made for. low_frequency_factor, high_frequency_factor: of Llama 3, in turns over
    `original_positions`; beta_fast, beta_slow: of YaRN, in turns over `original_positions`.
    """

    base: float = bounded(10_000.0, above=1)
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
class ModelConfig:
    """A pre-norm decoder with grouped-query attention and SwiGLU.

    layers: blocks of attention and SwiGLU. width: size of the residual stream. heads: of queries. kv_heads: of keys
    and values, each shared by heads / kv_heads query heads. head_dim: size of a head; heads * head_dim need not be
    the width. feed_forward: inner size of SwiGLU. vocabulary_size: of the model; 0 takes the data's, rounded up to a
    multiple of 64. norm_epsilon: of every RMSNorm. qk_norm: normalise the queries and keys of each head.
    tied_embeddings: one table for input and output. key_convolution: how many keys a short convolution on the
    keys reads, 0 without one (FlashMoBA, arXiv 2511.11571).
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
    rope: RopeConfig = field(default_factory=RopeConfig)

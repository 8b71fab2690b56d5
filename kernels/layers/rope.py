"""Rotary position embedding by explicit absolute position, with the rescalings that long-context models use.

Legend: T tokens, H heads, D head dim, R features that rotate: the first of a head, all (R = D) unless rotation is
partial. Feature i rotates with feature i + R/2 (the half-split pairing of the Hugging Face Llama, Qwen and NeoX
weights). Positions are data, one per token and in any order: shards cut by zigzag, permutation or packing need no other
code.

Rotation: Su et al., RoFormer, arXiv:2104.09864, section 3.2.2, equations 15 and 34.
Partial rotation: Black et al., GPT-NeoX-20B, arXiv:2204.06745, section 2.1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.device_copies import copy_to
from farspan.kernels.layers import fused

_TABLE_CHUNK_TOKENS = 65_536  # bounds the float64 scratch of a table: 32 MiB a tensor at D = 128


class RopeScaling(ABC):
    """Rescales the frequencies of a model trained on short text for a longer context."""

    __slots__ = ()

    @abstractmethod
    def rescale(self, frequencies: Tensor, base: float) -> Tensor:
        """The rescaled inverse frequencies [R/2], float64 like `frequencies`."""

    def table_factor(self) -> float:
        """The factor of cos and sin, hence of queries and keys; scores are multiplied by its square."""
        return 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: divide the slow frequencies by `factor`, keep the fast ones, blend linearly in turns between.

    A frequency that turns fewer than `low_freq_factor` times over the original context is slow; one that turns more
    than `high_freq_factor` times is fast. The paper (arXiv:2407.21783) gives only the base; the formula is that of the
    released model's code.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _check_scaling(self.factor, self.original_positions)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )

    def rescale(self, frequencies: Tensor, base: float) -> Tensor:
        turns = self.original_positions * frequencies / (2 * math.pi)
        unscaled = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(frequencies, self.factor, unscaled.clamp(0, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling(RopeScaling):
    """YaRN, Peng et al., arXiv:2309.00071: section 3.2 (by parts) for frequencies, 3.4 for the attention factor.

    `beta_fast` and `beta_slow` are turns over the original context. The paper ramps linearly in turns; its released
    code, and with it every trained model, ramps linearly in the feature index between the two indices that make
    those turns, rounded outwards. This follows the code.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        _check_scaling(self.factor, self.original_positions)
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} must be positive and at most beta_fast={self.beta_fast}")

    def rescale(self, frequencies: Tensor, base: float) -> Tensor:
        rotated = 2 * len(frequencies)

        def index_turning(turns: float) -> float:
            """The real-valued i with original_positions · base^(-2i/R) = 2π · turns."""
            return rotated * math.log(self.original_positions / (2 * math.pi * turns)) / (2 * math.log(base))

        first = max(math.floor(index_turning(self.beta_fast)), 0)
        last = min(math.ceil(index_turning(self.beta_slow)), rotated - 1)  # R, not R / 2: as released
        index = torch.arange(len(frequencies), dtype=frequencies.dtype)
        scaled = ((index - first) / (last - first if last != first else 1e-3)).clamp(0, 1)
        return _blend(frequencies, self.factor, 1 - scaled)

    def table_factor(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


def attention_factor_of(scaling: RopeScaling | None) -> float:
    """The `attention_factor` that `rotation_table` needs for `scaling`."""
    return 1.0 if scaling is None else scaling.table_factor()


def inverse_frequencies(rotated: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """The angle per position of each feature pair, base^(-2i/R) and then rescaled: float64 [R/2], on the CPU."""
    if rotated < 2 or rotated % 2:
        raise ValueError(f"rotated={rotated} must be even and positive: rotary embedding turns features in pairs")
    if base <= 1:
        raise ValueError(f"rope base={base} must exceed 1")
    frequencies = base ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    return frequencies if scaling is None else scaling.rescale(frequencies, base)


@lru_cache(maxsize=16)
def inverse_frequencies_on(
    device: torch.device, rotated: int, base: float, scaling: RopeScaling | None = None
) -> Tensor:
    """`inverse_frequencies` on a device, to which they are copied once for all sequences."""
    frequencies = inverse_frequencies(rotated, base, scaling)
    # From pinned memory, so that the host does not wait.
    return copy_to(frequencies, device)


def rotation_table(
    position: Tensor, inverse_frequencies: Tensor, attention_factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R/2] of position · frequency, times `attention_factor`, on the device of `position`.

    Angles are float64, since a float32 angle at position 10 million is wrong by more than half a radian. The float64
    angle is good to 3e-9 there, so a float32 table is the exact one rounded (error below 2^-24), at any position up to
    10 million; a float64 table keeps absolute accuracy position · 3e-16.
    """
    cos = torch.empty(len(position), len(inverse_frequencies), dtype=dtype, device=position.device)  # [T, R/2]
    sin = torch.empty_like(cos)
    frequencies = inverse_frequencies.to(position.device, torch.float64)
    for start in range(0, len(position), _TABLE_CHUNK_TOKENS):
        rows = slice(start, start + _TABLE_CHUNK_TOKENS)
        angle = position[rows, None].double() * frequencies  # [chunk, R/2]
        cos[rows] = angle.cos() * attention_factor
        sin[rows] = angle.sin() * attention_factor
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of x [T, H, D] by the tables [T, R/2]; the rest stays as it is.

    Computed in the widest dtype given and at least float32; the result has the dtype of `x`. The backward pass keeps
    the tables only, nothing of the size of `x`.
    """
    rotated = 2 * cos.shape[-1]
    if x.shape[-1] < rotated:
        raise ValueError(f"x has head width {x.shape[-1]} but the rotation table turns {rotated} features")
    compute = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin = cos.to(compute)[:, None], sin.to(compute)[:, None]  # [T, 1, R/2]
    first, second, still = x.to(compute).tensor_split((rotated // 2, rotated), dim=-1)  # [T, H, R/2] twice, [T, H, D-R]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, still), dim=-1).to(x.dtype)


def rotate_queries_and_keys(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rope` of q [T, Hq, D] and k [T, Hk, D], in one kernel on a GPU; no gradient reaches the tables there."""
    rotated = 2 * cos.shape[-1]
    if fused.serves(q, k, cos, sin) and cos.dtype == torch.float32 and rotated <= q.shape[-1]:
        return _Rotation.apply(q, k, cos, sin)  # pyright: ignore[reportReturnType]
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Triton is installed wherever torch has CUDA, and need not be elsewhere.
        from farspan.kernels.triton_kernels import layers_launch

        ctx.save_for_backward(cos, sin)
        return layers_launch.rope(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from farspan.kernels.triton_kernels import layers_launch

        # The inverse of a rotation is its transpose; a factor of the tables stays as it is.
        return *layers_launch.rope(dq, dk, *ctx.saved_tensors, back=True), None, None


def _blend(frequencies: Tensor, factor: float, unscaled: Tensor) -> Tensor:
    """Return frequencies where `unscaled` is 1, frequencies / factor where it is 0, and the line between them."""
    return frequencies * (unscaled + (1 - unscaled) / factor)


def _check_scaling(factor: float, original_positions: int) -> None:
    if factor < 1:
        raise ValueError(f"rope scaling factor={factor} must be at least 1: it is new context / original context")
    if original_positions < 1:
        raise ValueError(f"rope scaling original_positions={original_positions} must be positive")

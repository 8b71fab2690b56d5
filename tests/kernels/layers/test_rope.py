"""Rotary embedding against scalar formulas, exact arithmetic and the values of transformers."""

import cmath
import decimal
import math
from decimal import Decimal

import pytest
import torch

from farspan.kernels.layers import rope
from farspan.kernels.layers.rope import (
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    apply_rope,
    attention_factor_of,
    inverse_frequencies,
    rotation_table,
)
from tests.support.mechanisms import normal

LLAMA_31 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
LLAMA_32 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
QWEN_3 = YarnScaling(factor=4.0, original_positions=32768)
YARN_16 = YarnScaling(factor=16.0, original_positions=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25)
YARN_LONG = YarnScaling(factor=2.0, original_positions=131_072)

# transformers 5.23.0, ROPE_INIT_FUNCTIONS on torch 2.13.0 (CPU, float32): head dim, base, scaling, attention factor and
# some inverse frequencies by index.
# fmt: off
GOLDEN = {
    "llama-3.1-8b": (128, 500_000.0, LLAMA_31, 1.0, {
        0: 1.0, 1: 0.814617217, 24: 0.00729266508, 29: 0.00216657063, 32: 0.000524846022, 63: 3.06892588e-07}),
    "llama-3.2-1b": (64, 500_000.0, LLAMA_32, 1.0, {
        0: 1.0, 1: 0.663601279, 13: 0.00483942125, 16: 0.000429556705, 20: 8.57025589e-06, 31: 9.41830649e-08}),
    "qwen3-yarn-4": (128, 1_000_000.0, QWEN_3, 1.138629436111989, {
        0: 1.0, 1: 0.805842221, 24: 0.00537532149, 29: 0.00140511245, 32: 0.000602941145, 40: 4.44569851e-05}),
    "yarn-16-own-betas": (64, 10_000.0, YARN_16, 1.25, {
        0: 1.0, 1: 0.749894202, 13: 0.0212435555, 16: 0.00583333336, 20: 0.000527046272, 31: 8.3345094e-06}),
    "yarn-2-ramp-past-the-last-pair": (64, 10_000.0, YARN_LONG, 1.0693147180559945, {
        0: 1.0, 1: 0.749894202, 20: 0.00316227786, 24: 0.000923076936, 28: 0.000243252143, 31: 8.71917873e-05}),
}
# fmt: on


def scalar_frequency(index: int, head_dim: int, base: float, scaling: RopeScaling | None) -> float:
    """The frequency of one pair, by the branches that the released codes take."""
    plain = 1.0 / base ** (2 * index / head_dim)
    if isinstance(scaling, Llama3Scaling):
        wavelength = 2 * math.pi / plain
        if wavelength < scaling.original_positions / scaling.high_freq_factor:
            return plain
        if wavelength > scaling.original_positions / scaling.low_freq_factor:
            return plain / scaling.factor
        smooth = scaling.original_positions / wavelength - scaling.low_freq_factor
        smooth /= scaling.high_freq_factor - scaling.low_freq_factor
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    if isinstance(scaling, YarnScaling):
        ends = []
        for turns in (scaling.beta_fast, scaling.beta_slow):
            slowness = scaling.original_positions / (turns * 2 * math.pi)  # base^(2i/D) that makes these turns
            ends.append(head_dim / 2 * math.log(slowness, base))
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), head_dim - 1)
        if index <= first:
            return plain
        if index >= last:
            return plain / scaling.factor
        ramp = (index - first) / (last - first)
        return ramp * plain / scaling.factor + (1 - ramp) * plain
    return plain


@pytest.mark.parametrize(("head_dim", "base", "scaling", "factor", "values"), GOLDEN.values(), ids=GOLDEN)
def test_frequencies_equal_those_of_transformers(
    head_dim: int, base: float, scaling: RopeScaling, factor: float, values: dict[int, float]
) -> None:
    frequencies = inverse_frequencies(head_dim, base, scaling)
    assert frequencies.dtype == torch.float64
    assert {i: frequencies[i].item() for i in values} == pytest.approx(values, rel=2e-6)  # theirs are float32
    assert attention_factor_of(scaling) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("scaling", [None, LLAMA_31, LLAMA_32, QWEN_3, YARN_16, YARN_LONG], ids=str)
@pytest.mark.parametrize(("head_dim", "base"), [(128, 500_000.0), (96, 10_000.0), (2, 1e6)])
def test_frequencies_equal_a_scalar_loop(head_dim: int, base: float, scaling: RopeScaling | None) -> None:
    expected = [scalar_frequency(i, head_dim, base, scaling) for i in range(head_dim // 2)]
    torch.testing.assert_close(
        inverse_frequencies(head_dim, base, scaling), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_yarn_with_an_empty_ramp_switches_at_its_index() -> None:
    """Here both ends, rounded outwards and clamped, are index 0."""
    scaling = YarnScaling(factor=2.0, original_positions=32, beta_fast=32.0, beta_slow=32.0)
    plain = inverse_frequencies(8, 10_000.0)
    expected = plain / torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(8, 10_000.0, scaling), expected, rtol=1e-14, atol=0)


def test_unscaled_attention_factor_is_one() -> None:
    assert attention_factor_of(None) == 1.0
    assert attention_factor_of(YarnScaling(factor=1.0, original_positions=8)) == 1.0


@pytest.mark.parametrize("head_dim", [1, 63, 0, -2])
def test_odd_or_empty_head_width_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"rotated={head_dim} must be even"):
        inverse_frequencies(head_dim, 10_000.0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"base=1\.0"):
        inverse_frequencies(8, 1.0)
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        YarnScaling(factor=0.5, original_positions=4096)
    with pytest.raises(ValueError, match="original_positions=0"):
        YarnScaling(factor=2.0, original_positions=0)
    with pytest.raises(ValueError, match="beta_slow"):
        YarnScaling(factor=2.0, original_positions=4096, beta_fast=1.0, beta_slow=2.0)
    with pytest.raises(ValueError, match="below high_freq_factor"):
        Llama3Scaling(factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0, original_positions=8192)


def exact_angle(position: int, index: int, head_dim: int, base: int) -> float:
    """position · base^(-2i/D) modulo 2π, in 60 decimal digits."""
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494")
    with decimal.localcontext(prec=60):
        return float(position * (Decimal(base).ln() * -2 * index / head_dim).exp() % two_pi)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_tables_are_exact_to_ten_million(head_dim: int) -> None:
    positions = [0, 1, 131_071, 1_048_575, 9_999_991, 10_000_000]
    angles = [[exact_angle(p, i, head_dim, 500_000) for i in range(head_dim // 2)] for p in positions]
    exact_angles = torch.tensor(angles, dtype=torch.float64)
    exact_cos, exact_sin = exact_angles.cos(), exact_angles.sin()
    frequencies = inverse_frequencies(head_dim, 500_000.0)
    for dtype, bound in ((torch.float64, 3e-9), (torch.float32, 2**-24)):
        cos, sin = rotation_table(torch.tensor(positions, dtype=torch.int32), frequencies, dtype=dtype)
        assert cos.dtype == sin.dtype == dtype
        assert (cos.double() - exact_cos).abs().max() <= bound
        assert (sin.double() - exact_sin).abs().max() <= bound


def test_tables_carry_the_attention_factor() -> None:
    position, frequencies = torch.arange(5, dtype=torch.int32), inverse_frequencies(8, 10_000.0)
    plain = rotation_table(position, frequencies, dtype=torch.float64)
    scaled = rotation_table(position, frequencies, 1.25, torch.float64)
    torch.testing.assert_close(scaled, tuple(x * 1.25 for x in plain), rtol=1e-15, atol=0)


def test_order_of_tokens_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    position = torch.randperm(100, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    frequencies = inverse_frequencies(10, 10_000.0)
    in_order = rotation_table(torch.arange(100, dtype=torch.int32), frequencies, dtype=torch.float64)
    monkeypatch.setattr(rope, "_TABLE_CHUNK_TOKENS", 7)
    shuffled = rotation_table(position, frequencies, dtype=torch.float64)
    expected = tuple(table[position.long()] for table in in_order)
    torch.testing.assert_close(shuffled, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (10, 4)])
def test_rotation_equals_complex_multiplication(head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    """Half-split pairing: features i and i + R/2 are one complex number; those from R on keep their bits."""
    tokens, heads = 5, 3
    (x,) = normal((tokens, heads, head_dim), dtype=dtype)
    position = torch.tensor([7, 0, 100_000, 3, 3], dtype=torch.int32)
    table = rotation_table(position, inverse_frequencies(rotated, 10_000.0, YARN_16), 1.25, torch.float64)
    out = apply_rope(x, *table)
    assert out.dtype == dtype
    assert torch.equal(out[..., rotated:], x[..., rotated:])
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-10
    for t, h, i in ((t, h, i) for t in range(tokens) for h in range(heads) for i in range(rotated // 2)):
        angle = position[t].item() * scalar_frequency(i, rotated, 10_000.0, YARN_16)
        turned = complex(x[t, h, i].item(), x[t, h, i + rotated // 2].item()) * cmath.rect(1.25, angle)
        assert out[t, h, i].item() == pytest.approx(turned.real, rel=bound, abs=1e-10)
        assert out[t, h, i + rotated // 2].item() == pytest.approx(turned.imag, rel=bound, abs=1e-10)


@pytest.mark.parametrize("scaling", [None, LLAMA_31, QWEN_3], ids=str)
def test_scores_depend_on_the_distance_only(scaling: RopeScaling | None) -> None:
    q, k = (x.expand(4, -1, -1) for x in normal((1, 1, 64), (1, 1, 64)))
    shift, distance = torch.tensor([0, 5, 123_456, 9_000_000], dtype=torch.int32), 777
    frequencies, factor = inverse_frequencies(64, 1e6, scaling), attention_factor_of(scaling)
    for dtype, bound in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        turned_q = apply_rope(q.to(dtype), *rotation_table(shift + distance, frequencies, factor, dtype))
        turned_k = apply_rope(k.to(dtype), *rotation_table(shift, frequencies, factor, dtype))
        score = (turned_q * turned_k).sum(-1)[:, 0]
        assert (score - score[0]).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_result_is_rounded_once_to_the_input_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    position, frequencies = torch.arange(6, dtype=torch.int32) * 999, inverse_frequencies(16, 10_000.0)
    out = apply_rope(x, *rotation_table(position, frequencies))
    exact = apply_rope(x.double(), *rotation_table(position, frequencies, dtype=torch.float64))
    assert out.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4e-7  # half a unit in the last place, and the float32 table
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("head_dim", "rotated"), [(6, 6), (10, 4)])
def test_gradient_is_right_and_saves_only_the_tables(head_dim: int, rotated: int) -> None:
    x = normal((4, 2, head_dim))[0].requires_grad_()
    position = torch.tensor([9, 2, 2, 40], dtype=torch.int32)
    cos, sin = rotation_table(position, inverse_frequencies(rotated, 10_000.0), 1.1, torch.float64)
    assert torch.autograd.gradcheck(apply_rope, (x, cos, sin))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rope(x, cos, sin)
    tables = {cos.untyped_storage().data_ptr(), sin.untyped_storage().data_ptr()}
    assert {t.untyped_storage().data_ptr() for t in saved} == tables


def test_empty_shard_and_wrong_table() -> None:
    frequencies = inverse_frequencies(8, 10_000.0)
    cos, sin = rotation_table(torch.zeros(0, dtype=torch.int32), frequencies)
    assert apply_rope(torch.zeros(0, 3, 8), cos, sin).shape == (0, 3, 8)
    with pytest.raises(ValueError, match="head width 6 but the rotation table turns 8"):
        apply_rope(torch.zeros(0, 3, 6), cos, sin)

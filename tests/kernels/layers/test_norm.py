"""RMS normalization against a float64 formula, and against the rounding of Llama's own code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.kernels.layers.norm import rms_norm
from tests.support.mechanisms import normal

EPS = 1e-5
Norm = Callable[[Tensor, Tensor], Tensor]


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight


def llama_rounding(x: Tensor, weight: Tensor) -> Tensor:
    """Normalize in float32, round to the input dtype, then multiply by the weight and round again."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, upstream = normal((33, 5, 70), (70,), (33, 5, 70))
    x, weight = (3 * x).to(dtype), (1 + 0.3 * weight).to(weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_(), upstream.to(dtype)


def relative_errors(norm: Norm, dtype: torch.dtype) -> list[float]:
    """Errors of the value and of both gradients against the float64 formula, in the 2-norm."""
    x, weight, upstream = inputs(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    out, exact = norm(x, weight), formula(wide[0], wide[1])
    ours = out, *torch.autograd.grad(out, (x, weight), upstream.to(out.dtype))
    true = exact, *torch.autograd.grad(exact, wide, upstream.double())
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, true, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 2**-9), (torch.float16, 2**-12)],
    ids=str,
)
def test_value_and_gradients(dtype: torch.dtype, bound: float) -> None:
    errors = relative_errors(lambda x, weight: rms_norm(x, weight, EPS), dtype)
    assert max(errors) <= bound, errors


def test_bfloat16_is_more_exact_than_rounding_twice() -> None:
    ours = relative_errors(lambda x, weight: rms_norm(x, weight, EPS), torch.bfloat16)
    twice = relative_errors(llama_rounding, torch.bfloat16)
    assert all(a < b for a, b in zip(ours, twice, strict=True)), (ours, twice)


def test_float32_weight_is_not_rounded_to_bfloat16() -> None:
    x, weight, _ = inputs(torch.bfloat16, torch.float32)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.bfloat16
    exact = formula(x.double(), weight.double())
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-4)).all()  # half a unit in the last place


def test_squares_do_not_overflow_float16() -> None:
    x = torch.full((2, 8), 60_000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.float16), EPS), torch.ones_like(x))


def test_zero_rows_and_zero_tokens() -> None:
    weight = torch.ones(8)
    assert torch.equal(rms_norm(torch.zeros(3, 8), weight, EPS), torch.zeros(3, 8))
    assert rms_norm(torch.zeros(0, 8), weight, EPS).shape == (0, 8)

"""torch's CPU operator as we call it: small triangles cut into halves, grouped heads side by side as rows."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.cpu import flash as cpu_flash
from farspan.kernels.cpu.flash import flash, flash_backward
from tests.support import oracle


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, more: Tensor, *, causal: bool) -> list[Tensor]:
    """Everything for `[N, heads, rows, width]`; the backward pass is told an lse larger than its keys' own."""
    out, lse = flash(q, k, v, causal=causal, mask=None)
    return [out, lse, *flash_backward(dout, q, k, v, out, lse + more, causal=causal, mask=None)]


def expect(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, more: Tensor, *, causal: bool) -> list[Tensor]:
    """The same by the formulas; a larger lse makes each probability, and so what a pair adds, smaller."""
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ key.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ value
    probability = (scores - (lse + more).unsqueeze(-1)).exp()
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = probability * (dout @ value.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    dk, dv = dscores.transpose(-1, -2) @ q, probability.transpose(-1, -2) @ dout
    return [out, lse, dscores @ key, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))]


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("size", [200, 383, 384, 512, 770, 2048])
def test_triangles_equal_the_formula(size: int, heads: tuple[int, int]) -> None:
    q, dout, more = draw(2, heads[0], size, 16, seed=0), draw(2, heads[0], size, 8, seed=1), torch.rand(1).double()
    k, v = draw(2, heads[1], size, 16, seed=2), draw(2, heads[1], size, 8, seed=3)
    found = run(q, k, v, dout, more, causal=True)
    for name, got, right in zip(
        ("out", "lse", "dq", "dk", "dv"), found, expect(q, k, v, dout, more, causal=True), strict=True
    ):
        assert oracle.relative_error(got, right) <= oracle.RELATIVE_TOLERANCE[torch.float64], name


@pytest.mark.parametrize("rows", [5, 900])
def test_grouped_heads_equal_the_formula_whatever_the_strides(rows: int) -> None:
    q, dout, more = draw(2, rows, 4, 16, seed=0), draw(2, rows, 4, 8, seed=1), torch.rand(1).double()
    k, v = draw(2, 30, 2, 16, seed=2), draw(2, 30, 2, 8, seed=3)
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    found = run(q, k, v, dout, more, causal=False)
    for got, right in zip(found, expect(q, k, v, dout, more, causal=False), strict=True):
        assert oracle.relative_error(got, right) <= oracle.RELATIVE_TOLERANCE[torch.float64]


def test_which_triangles_are_cut() -> None:
    """Those of which the operator would compute twice what is visible; never where halves would be rounded."""
    squares = {size: torch.empty(1, 1, size, 1) for size in (256, 382, 384, 385, 512, 2048, 2050)}
    assert [size for size, x in squares.items() if cpu_flash._is_cut(x, x)] == [384, 512, 2048]
    assert not cpu_flash._is_cut(squares[512].bfloat16(), squares[512].bfloat16())
    assert not cpu_flash._is_cut(squares[512], squares[256])

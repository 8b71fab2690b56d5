"""torch's CPU operator as we call it: small triangles cut into halves, grouped heads side by side as rows."""

import math

import pytest
import torch
from torch import Tensor

from farspan.kernels.cpu import flash as cpu_flash
from farspan.kernels.cpu.flash import flash, flash_backward
from tests.support import oracle
from tests.support.attention_cases import Tensors, expect
from tests.support.mechanisms import normal


def check(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, causal: bool) -> None:
    """Everything for `[N, heads, rows, width]`; the backward pass is told an lse larger than its keys' own.

    That makes each probability, and so what a pair adds to the gradients, as much smaller.
    """
    out, lse = flash(q, k, v, causal=causal, mask=None)
    gradients = flash_backward(dout, q, k, v, out, lse + 0.7, causal=causal, mask=None)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = (mask.tril() if causal else mask).expand(q.shape[1], -1, -1)
    for number in range(len(q)):
        expected = expect(Tensors(*(x[number].transpose(0, 1) for x in (q, k, v, dout))), mask)
        expected[2:] = [gradient * math.exp(-0.7) for gradient in expected[2:]]
        oracle.assert_close([x[number].transpose(0, 1) for x in (out, lse, *gradients)], expected)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("size", [200, 383, 384, 512, 770, 2048])
def test_triangles_equal_the_formula(size: int, heads: tuple[int, int]) -> None:
    query, kv = (2, heads[0], size), (2, heads[1], size)
    check(*normal((*query, 16), (*kv, 16), (*kv, 8), (*query, 8)), causal=True)


@pytest.mark.parametrize("rows", [5, 900])
def test_grouped_heads_equal_the_formula_whatever_the_strides(rows: int) -> None:
    tensors = normal((2, rows, 4, 16), (2, 30, 2, 16), (2, 30, 2, 8), (2, rows, 4, 8))
    check(*(x.transpose(1, 2) for x in tensors), causal=False)


def test_which_triangles_are_cut() -> None:
    """Those of which the operator would compute twice what is visible; never where halves would be rounded."""
    squares = {size: torch.empty(1, 1, size, 1) for size in (256, 382, 384, 385, 512, 2048, 2050)}
    assert [size for size, x in squares.items() if cpu_flash._is_cut(x, x)] == [384, 512, 2048]
    assert not cpu_flash._is_cut(squares[512].bfloat16(), squares[512].bfloat16())
    assert not cpu_flash._is_cut(squares[512], squares[256])

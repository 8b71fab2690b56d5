"""16-bit inputs: sums are float32, and errors do not grow with the length."""

import pytest
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.attention_cases import ABLE, Tensors, run


@pytest.mark.parametrize("backend", ABLE)
def test_sums_of_parts_are_float32_for_half_inputs(backend: str) -> None:
    """A query meets its keys in dozens of parts: in bfloat16 their sum would drown in rounding."""
    rows = Rows.packed([700])
    tensors = Tensors.random(len(rows), len(rows), (2, 1), dtype=torch.bfloat16)
    plan = Plan.build(rows, rows, AttentionMask(window=600), heads=2)
    out, _, *gradients = run(tensors, plan, backend)
    for x in (out, *gradients):
        assert x.dtype == torch.float32
        assert (x != x.bfloat16().float()).float().mean() > 0.1


@pytest.mark.parametrize("heads", [(8, 1), (1, 1)])
@pytest.mark.parametrize("backend", ABLE)
def test_half_precision_gradients_do_not_get_worse_with_length(backend: str, heads: tuple[int, int]) -> None:
    """One document of 2,048 tokens: dk and dv are sums of thousands of products, as exact as two roundings allow."""
    rows = Rows.packed([2048])
    half = Tensors.random(2048, 2048, heads, dtype=torch.bfloat16)
    full = Tensors(*(x.float() for x in half))
    plan = Plan.build(rows, rows, AttentionMask(), heads=heads[0])
    of_half, of_full = (run(tensors, plan, backend)[2:] for tensors in (half, full))
    for name, got, expected in zip(("dq", "dk", "dv"), of_half, of_full, strict=True):
        # bfloat16 rounds to 2^-9: out once before the backward pass, the gradient once after it.
        assert oracle.rms_error(got, expected) < 3e-3, name

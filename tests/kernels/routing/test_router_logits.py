"""Routing logits against a product of matrices, gradients against autograd; ties are real."""

import pytest
import torch

from farspan.kernels.routing import router_logits as routing
from farspan.kernels.routing.router_logits import routing_logits


@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (7, 4), (8, 4), (7, 100)])
def test_float64_is_the_product(tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "CHUNK_TOKENS", chunk)
    x, weight = torch.randn(tokens, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(routing_logits, (x.requires_grad_(), weight.requires_grad_()))
    torch.testing.assert_close(routing_logits(x, weight), x @ weight.t(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_not_rounded_to_the_inputs_dtype(dtype: torch.dtype) -> None:
    x, weight = torch.randn(50, 64).to(dtype).requires_grad_(), torch.randn(2, 64).to(dtype).requires_grad_()
    logits = routing_logits(x, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (x.double() @ weight.double().t()).float())
    dlogits = torch.randn(50, 2)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    assert dx.dtype == dweight.dtype == dtype
    torch.testing.assert_close(dx, (dlogits @ weight.float()).to(dtype))
    torch.testing.assert_close(dweight, (dlogits.t() @ x.float()).to(dtype))


def test_equal_tokens_have_equal_logits_wherever_they_are() -> None:
    """A product of float32 matrices sums in an order that depends on the number of rows and on the place."""
    x, weight = torch.randn(1, 1000), torch.randn(3, 1000)
    single = routing_logits(x, weight)
    for count in (2, 3, 17, 130):
        assert torch.equal(routing_logits(x.expand(count, -1), weight), single.expand(count, -1))

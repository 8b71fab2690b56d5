"""Projections by chosen matrices against every matrix on every token, in float64."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.moe.gathered_linear import Choices, combine_chosen, project_chosen
from tests.support.mechanisms import normal

TOKENS, WIDTH, INNER = 13, 6, 5
CHOSEN = {
    "two of five": [[t % 5, (t + 1 + t // 4) % 5] for t in range(TOKENS)],
    "one matrix takes all": [[3]] * TOKENS,
    "all, in another order for each token": [[(t + i) % 5 for i in range(5)] for t in range(TOKENS)],
}  # fmt: skip


def leaves(choices: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, y and weight of the way back, a view as of a part of a wider matrix."""
    shapes = ((TOKENS, WIDTH), (5, INNER, WIDTH), (TOKENS, choices, INNER), (WIDTH, 5 * INNER))
    return [leaf.requires_grad_() for leaf in normal(*shapes, dtype=dtype)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("case", CHOSEN)
def test_equals_every_matrix_on_every_token(case: str, dtype: torch.dtype, tolerance: float) -> None:
    chosen = torch.tensor(CHOSEN[case])
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    choices = Choices.of(chosen, 5)
    inputs = leaves(chosen.shape[1], dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]

    x, weight, y, out = inputs
    projected = project_chosen(x, weight, choices)
    combined = combine_chosen(y, out.unflatten(1, (5, INNER)).transpose(0, 1), choices)
    assert projected.dtype == combined.dtype == dtype
    x, weight, y, out = exact
    pick = torch.nn.functional.one_hot(chosen, 5).double()
    wanted = torch.einsum("tke,eow,tw->tko", pick, weight, x)
    wanted_combined = torch.einsum("tke,wei,tki->tw", pick, out.unflatten(1, (5, INNER)), y)
    dout = normal(projected.shape, combined.shape, seed=1, dtype=dtype)
    got = projected, combined, *torch.autograd.grad([projected, combined], inputs, dout)
    gradients = torch.autograd.grad([wanted, wanted_combined], exact, [d.double() for d in dout])
    for a, b in zip(got, (wanted, wanted_combined, *gradients), strict=True):
        assert (a.double() - b).abs().max().item() <= tolerance * b.abs().max().item()


def test_matrices_that_no_token_chooses_are_not_read() -> None:
    choices = Choices.of(torch.tensor([[0, 2], [2, 0]]), 3)
    weight = torch.ones(3, 4, 4)
    weight[1] = torch.nan
    x = torch.ones(2, 4, requires_grad=True)
    out = combine_chosen(project_chosen(x, weight, choices), weight, choices)
    out.sum().backward()
    assert x.grad is not None
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_without_tokens() -> None:
    choices = Choices.of(torch.empty(0, 2, dtype=torch.int64), 3)
    x, weight = torch.empty(0, 4, requires_grad=True), torch.ones(3, 5, 4, requires_grad=True)
    out = project_chosen(x, weight, choices)
    assert out.shape == (0, 2, 5)
    out.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_sum_is_rounded_once() -> None:
    """In bfloat16 256 + 1 is 256."""
    choices = Choices.of(torch.tensor([[0, 1, 2]]), 3)
    y = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert combine_chosen(y, torch.ones(3, 1, 1, dtype=torch.bfloat16), choices).item() == 258

"""A linear map by many experts against the formula, row by row with torch's own gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.kernels.moe.grouped_linear import grouped_linear
from tests.kernels.moe.test_grouped_gemm import COUNTS, TOLERANCE


def inputs(rows: int, dtype: torch.dtype, sizes: tuple[int, int]) -> list[Tensor]:
    """Return x `[rows, in]` and weight `[5, out, in]`; sizes: in and out."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, sizes[0]), (5, sizes[1], sizes[0]))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def by_formula(x: Tensor, weight: Tensor, *, counts: list[int]) -> Tensor:
    expert = torch.arange(5).repeat_interleave(torch.tensor(counts))
    return torch.einsum("nc,noc->no", x, weight[expert])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_the_formula(counts: list[int], dtype: torch.dtype) -> None:
    mine = inputs(sum(counts), dtype, (6, 10))
    exact = [x.detach().double().requires_grad_() for x in mine]
    dout = torch.randn(sum(counts), 10, dtype=torch.float64).to(dtype)
    out, expected = grouped_linear(*mine, counts=counts), by_formula(*exact, counts=counts)
    assert out.dtype == dtype
    got = [out, *torch.autograd.grad(out, mine, dout)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert not a.numel() or (a - b).abs().amax().item() <= TOLERANCE[dtype] * b.abs().amax().item()


# Of a parameter, the weight [5, 20, 12] of the experts: stretches of the outputs or the inputs of one linear map, a
# part of it, one matrix for all.
VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "outputs": ((100, 12), lambda w: w.view(5, 20, 12)),
    "inputs": ((20, 60), lambda w: w.view(20, 5, 12).transpose(0, 1)),
    "transposed": ((12, 100), lambda w: w.view(12, 5, 20).permute(1, 2, 0)),
    "a part": ((9, 24, 17), lambda w: w[2:7, 1:21, 3:15]),
    "shared": ((20, 12), lambda w: w.expand(5, -1, -1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_weights_may_be_views(name: str) -> None:
    check_view(name, torch.float64)


def check_view(name: str, dtype: torch.dtype) -> None:
    """Compare the gradient of a parameter, of which the weight is a view, and that of the rows."""
    shape, view = VIEWS[name]
    counts = [3, 17, 0, 0, 1]
    generator = torch.Generator().manual_seed(0)
    parameter, x, dout = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in (shape, (21, 12), (21, 20))
    )
    results = []
    for run, of in ((grouped_linear, lambda t: t.clone()), (by_formula, lambda t: t.double())):
        leaves = of(parameter).requires_grad_(), of(x).requires_grad_()
        out = run(leaves[1], view(leaves[0]), counts=counts)
        results.append([out, *torch.autograd.grad(out, leaves, of(dout))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().amax().item() <= TOLERANCE[dtype] * b.abs().amax().item()


def test_a_gradient_is_laid_out_as_its_weight() -> None:
    """So that adding it to another, as over micro-batches, copies nothing."""
    parameter = torch.randn(20, 60)
    weight = parameter.view(20, 5, 12).transpose(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(grouped_linear(torch.randn(4, 12), weight, [4, 0, 0, 0, 0]).sum(), weight)
    assert gradient.stride() == weight.stride()


@pytest.mark.parametrize(
    ("counts", "weight", "message"),
    [
        ([3, 1, 0, 9], (5, 10, 6), "4 experts with 13 rows in all, but 5 and 13 are here"),
        ([3, 1, 0, 7, 3], (5, 10, 6), "5 experts with 14 rows in all, but 5 and 13 are here"),
        ([14, 0, 0, 0, -1], (5, 10, 6), "an expert has 0 rows or more"),
        ([3, 1, 0, 7, 2], (5, 10, 8), r"weight \[5, 10, 8\] does not fit rows \[13, 6\]: \[5, 10, 6\] does"),
    ],
)
def test_what_does_not_fit_is_refused(counts: list[int], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.zeros(13, 6), torch.zeros(weight), counts)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.float64, and its rows are torch\.float32"):
        grouped_linear(torch.zeros(13, 6), torch.zeros(1, 10, 6, dtype=torch.float64), [13])

"""SwiGLU by many experts against the formula, expert by expert with torch's own gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from tests.support.mechanisms import normal
from tests.support.oracle import rms_error

COUNTS = {"ragged": [3, 1, 0, 7, 2], "one has all": [0, 0, 13, 0, 0], "none": [0, 0, 0, 0, 0]}


def inputs(rows: int, dtype: torch.dtype, sizes: tuple[int, int] = (6, 10)) -> Any:
    """Return x, gate, up and down of 5 experts; sizes: width and inner size."""
    width, inner = sizes
    shapes = ((rows, width), (5, inner, width), (5, inner, width), (5, width, inner))
    return [leaf.requires_grad_() for leaf in normal(*shapes, dtype=dtype)]


def by_formula(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, counts: list[int]) -> Tensor:
    expert = torch.arange(5).repeat_interleave(torch.tensor(counts))
    inner = F.silu(torch.einsum("nc,nfc->nf", x, gate[expert])) * torch.einsum("nc,nfc->nf", x, up[expert])
    return torch.einsum("nf,ncf->nc", inner, down[expert])


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
"""Of the largest value; 16 bits are compared by their rounding."""


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_the_formula(counts: list[int], dtype: torch.dtype) -> None:
    check(inputs(sum(counts), dtype), counts)


def check(leaves: list[Tensor], counts: list[int]) -> None:
    """Compare out and all gradients with the formula."""
    dtype = leaves[0].dtype
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = grouped_swiglu(*leaves, counts=torch.tensor(counts)), by_formula(*exact, counts=counts)
    (dout,) = normal(expected.shape, seed=3, dtype=dtype)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == dtype
        assert a.shape == b.shape
        if not b.any():
            assert not a.any(), number
        elif dtype in TOLERANCE:
            assert (a - b).abs().amax().item() <= TOLERANCE[dtype] * b.abs().amax().item(), number
        else:
            # Twice rounded at most, inner values and result, by half an eps each.
            assert rms_error(a, b) <= torch.finfo(dtype).eps, number
    for expert in (expert for expert, count in enumerate(counts) if not count):
        assert not any(gradient[expert].any() for gradient in got[2:])


def test_weights_may_be_views() -> None:
    """Parts of larger matrices, transposed; and one matrix for all experts."""
    x, *weights = inputs(13, torch.float64)
    views = [F.pad(w.detach(), (1, 2)).transpose(1, 2).contiguous().transpose(1, 2)[..., 1:-2] for w in weights]
    for leaves in (views, [w.detach()[:1].expand(5, -1, -1) for w in weights]):
        check([x, *(w.requires_grad_() for w in leaves)], [3, 1, 0, 7, 2])


def test_rows_of_an_expert_may_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.kernels.moe.grouped_loop.CHUNK_ROWS", 3)
    test_equals_the_formula([3, 1, 0, 7, 2], torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_after_the_last_expert_have_none(dtype: torch.dtype) -> None:
    """They are 0, whatever they hold, and no gradient depends on them."""
    counts = torch.tensor([3, 1, 0, 7, 2])
    x, *weights = inputs(15, dtype)
    x.data[13:] = torch.nan
    (dout,) = normal((15, 6), seed=3, dtype=dtype)
    out = grouped_swiglu(x, *weights, counts=counts)
    got = [out, *torch.autograd.grad(out, (x, *weights), dout)]
    assert not any(rows[13:].any() for rows in got[:2])
    few = grouped_swiglu(x[:13], *weights, counts=counts)
    expected = [few, *torch.autograd.grad(few, (x, *weights), dout[:13])]
    assert all(torch.equal(a[:13], b[:13]) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("counts", [[3, 1, 0, 7, 3], [14, 0, 0, 0, -1]])
def test_counts_that_do_not_fit_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="experts have 0 rows or more, of 13 in all"):
        grouped_swiglu(*inputs(13, torch.float64), counts=torch.tensor(counts))
    with pytest.raises(ValueError, match=r"counts must be int64 \[5\], not torch.int64 \[4\]"):
        grouped_swiglu(*inputs(13, torch.float64), counts=torch.tensor(counts[:4]))


def test_matrices_that_do_not_fit_are_refused() -> None:
    x, gate, up, down = inputs(13, torch.float64)
    counts = torch.tensor([13, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"down \[5, 10, 6\] does not fit rows \[13, 6\]: \[5, 6, 10\] does"):
        grouped_swiglu(x, gate, up, down.transpose(1, 2), counts)
    with pytest.raises(ValueError, match=r"up \[4, 10, 6\] does not fit"):
        grouped_swiglu(x, gate, up[1:], down, counts)
    with pytest.raises(ValueError, match=r"up is torch\.float32, and its rows are torch\.float64"):
        grouped_swiglu(x, gate, up.float(), down, counts)

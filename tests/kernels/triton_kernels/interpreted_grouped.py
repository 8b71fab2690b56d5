"""Products of rows and matrices of their experts by Triton, interpreted, against the formula in float64.

`test_interpreted.py` runs this file in a process of its own. Tiles are small, so that few rows make several, and of
another size along each direction.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.moe import grouped_gemm as choice
from farspan.kernels.moe.grouped_linear import grouped_linear
from farspan.kernels.moe.grouped_swiglu import grouped_swiglu
from farspan.kernels.triton_kernels import grouped_launch as grouped
from farspan.kernels.triton_kernels.grouped_launch import Matrices, Stretches, Tile, Tiles
from tests.kernels.moe import test_grouped_linear as linear
from tests.kernels.moe import test_grouped_gemm as swiglu
from tests.support import interpreter_bfloat16
from tests.support.oracle import RELATIVE_TOLERANCE, relative_error, rms_error

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SMALL = Tiles(
    product=Tile(16, 32, 16, 4, 1),
    swiglu=Tile(32, 16, 32, 4, 1),
    swiglu_backward=Tile(16, 32, 32, 4, 1),
    weight=Tile(16, 32, 16, 4, 1),
)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_bfloat16.teach()
    monkeypatch.setattr(choice, "on_gpu", lambda x: True)
    for name in ("HALF", "ODD_HALF", "FLOAT32"):
        monkeypatch.setattr(grouped, name, SMALL)


def check_all(run: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], counts: Any) -> None:
    """Compare out and all gradients: float32 closely, others by their rounding."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = run(*inputs, counts=counts), formula(*exact, counts=counts)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert out.dtype == dtype
    got = [out, *torch.autograd.grad(out, inputs, dout)]
    wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
    for number, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        if not right.any():
            assert not mine.any(), number
        elif dtype == torch.float32:
            assert relative_error(mine, right) <= RELATIVE_TOLERANCE[dtype], number
        else:
            # Twice rounded at most, inner values and result, by half an eps each.
            assert rms_error(mine, right) <= torch.finfo(dtype).eps, number
    for expert, count in enumerate(counts):
        if not count:
            assert all(not gradient[expert].any() for gradient in got[2:])


COUNTS = {
    "ragged": [3, 33, 0, 16, 1],
    "one has all": [0, 0, 35, 0, 0],
    "one row": [0, 0, 0, 0, 1],
    "nobody": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_linear_equals_the_formula(counts: list[int]) -> None:
    check_all(grouped_linear, linear.by_formula, linear.inputs(sum(counts), torch.float32, (40, 37)), counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_swiglu_equals_the_formula(counts: list[int]) -> None:
    check_all(grouped_swiglu, swiglu.by_formula, swiglu.inputs(sum(counts), torch.float32, (40, 37)), counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    counts = [3, 20, 0, 0, 1]
    check_all(grouped_linear, linear.by_formula, linear.inputs(sum(counts), dtype, (20, 37)), counts)
    check_all(grouped_swiglu, swiglu.by_formula, swiglu.inputs(sum(counts), dtype, (20, 37)), counts)


@pytest.mark.parametrize("name", linear.VIEWS)
def test_views_of_weights(name: str) -> None:
    linear.check_view(name, torch.float32)


def test_rows_of_any_layout_give_the_same_bits() -> None:
    counts = [3, 17, 0, 0, 1]
    x, weight = linear.inputs(21, torch.float32, (40, 37))
    dout = torch.randn(21, 37)
    out = grouped_linear(x, weight, counts)
    expected = [out, *torch.autograd.grad(out, (x, weight), dout)]
    wide = torch.full((42, 80), NAN)
    wide[::2, :40] = x.detach()
    for other in (wide[::2, :40], x.detach().t().contiguous().t()):
        other = other.requires_grad_()
        out = grouped_linear(other, weight, counts)
        got = [out, *torch.autograd.grad(out, (other, weight), dout.t().contiguous().t())]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def _last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in another order: rows that one writes beyond its stretch stay, instead of being written again."""
    tiles = grouped.row_tiles
    monkeypatch.setattr(grouped, "row_tiles", lambda *a, **k: tiles(*a, **k)[::-1])


@pytest.mark.usefixtures("_last_first")
def test_nothing_is_written_beyond_a_stretch() -> None:
    counts = [3, 33, 0, 16, 1]
    check_all(grouped_swiglu, swiglu.by_formula, swiglu.inputs(sum(counts), torch.float32, (16, 15)), counts)


def test_rows_after_the_last_are_neither_read_nor_written() -> None:
    """What is read has NaN around it, before, behind and beside; what is written, another number."""
    counts = [3, 18, 0, 0, 1]
    x, weight = (t.detach() for t in linear.inputs(22, torch.float32, (40, 37)))
    expected = linear.by_formula(x, weight, counts=counts)
    given, dout = torch.full((40, 64), NAN), torch.full((40, 64), NAN)
    given[9:31, :40], dout[9:31, :37] = x, expected
    into, back = torch.full((40, 64), 7.0), torch.full((5, 48, 48), 7.0)
    stretches = Stretches(counts, x.device)
    grouped.product(into[9:31, :37], stretches, (given[9:31, :40], Matrices.of(weight)))
    assert relative_error(into[9:31, :37], expected) <= RELATIVE_TOLERANCE[torch.float32]
    grouped.weight_gradient(back[:, :37, :40], stretches, dout[9:31, :37], given[9:31, :40])
    wanted = torch.stack([a.t() @ b for a, b in zip(expected.split(counts), x.split(counts), strict=True)])
    assert relative_error(back[:, :37, :40], wanted) <= RELATIVE_TOLERANCE[torch.float32]
    assert int((into == 7.0).sum()) == into.numel() - 22 * 37
    assert int((back == 7.0).sum()) == back.numel() - 5 * 37 * 40


def test_what_a_neighbour_holds_does_not_matter() -> None:
    """Rows of one expert are NaN: those of all others, and gradients of their weights, are the same bits."""
    counts, spoilt = [5, 18, 0, 16, 1], 1
    rows = slice(5, 23)
    x, gate, up, down = swiglu.inputs(40, torch.float32, (16, 15))
    dout = torch.randn(40, 16)
    bad, bad_dout = x.detach().clone(), dout.clone()
    bad[rows], bad_dout[rows] = NAN, NAN
    bad.requires_grad_()
    found = []
    for rows_in, gradient in ((x, dout), (bad, bad_dout)):
        leaves = (rows_in, gate, up, down)
        out = grouped_swiglu(*leaves, counts)
        found.append([out, *torch.autograd.grad(out, leaves, gradient)])
    keep = torch.ones(40, dtype=torch.bool)
    keep[rows] = False
    others = [expert for expert in range(5) if expert != spoilt]
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(a[keep], b[keep])
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        assert torch.equal(a[others], b[others])
        assert b[spoilt].isnan().all()

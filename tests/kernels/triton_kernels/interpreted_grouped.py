"""Products of rows and matrices of their experts by Triton, interpreted, against the formula in float64.

`test_interpreted.py` runs this file in a process of its own. Tiles are small, so that few rows make several, and of
another size along each direction.
"""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder  # pyright: ignore[reportMissingImports]

from farspan.kernels.moe import gathered_linear
from farspan.kernels.moe import grouped_gemm as choice
from farspan.kernels.moe.gathered_linear import Choices, combine_chosen, project_chosen
from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.kernels.triton_kernels import grouped_launch as grouped
from farspan.kernels.triton_kernels.grouped_launch import ExpertRows, Rows, Tile, kernels
from tests.kernels.moe import test_gathered_linear as gathered
from tests.kernels.moe import test_grouped_gemm as swiglu
from tests.support import triton_interpreter
from tests.support.far_rows import far_rows
from tests.support.oracle import RELATIVE_TOLERANCE, relative_error

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SMALL = {
    kernels.product_kernel: Tile(16, 32, 16, 4, 1),
    kernels.swiglu_kernel: Tile(32, 16, 32, 4, 1),
    kernels.swiglu_backward_kernel: Tile(16, 32, 32, 4, 1),
    kernels.weight_kernel: Tile(16, 32, 16, 4, 1),
}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.patch()
    monkeypatch.setattr(choice, "on_gpu", lambda x: True)
    monkeypatch.setattr(grouped, "TILES", {kernel: (tile, tile, tile) for kernel, tile in SMALL.items()})


COUNTS = {
    "ragged": [3, 33, 0, 16, 1],
    "one has all": [0, 0, 35, 0, 0],
    "one row": [0, 0, 0, 0, 1],
    # 13 tiles of rows, which run side by side in groups of 8.
    "a group of tiles and a part": [3, 120, 0, 50, 1],
    "none": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_swiglu_equals_the_formula(counts: list[int]) -> None:
    swiglu.check(swiglu.inputs(sum(counts), torch.float32, (40, 37)), counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    counts = [3, 20, 0, 0, 1]
    swiglu.check(swiglu.inputs(sum(counts), dtype, (20, 37)), counts)


def test_rows_and_weights_of_any_layout_give_the_same_bits() -> None:
    counts = [3, 17, 0, 0, 1]
    x, *weights = swiglu.inputs(21, torch.float32, (40, 37))
    dout = torch.randn(21, 40)
    out = grouped_swiglu(x, *weights, counts=torch.tensor(counts))
    expected = [out, *torch.autograd.grad(out, (x, *weights), dout)]
    wide = torch.full((42, 80), NAN)
    wide[::2, :40] = x.detach()
    turned = [w.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for w in weights]
    for other, matrices in ((wide[::2, :40], weights), (x.detach().t().contiguous().t(), turned)):
        leaves = (other.requires_grad_(), *matrices)
        out = grouped_swiglu(*leaves, counts=torch.tensor(counts))
        got = [out, *torch.autograd.grad(out, leaves, dout.t().contiguous().t())]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        # Laid out like its weight, so that adding it to another, as over micro-batches, copies nothing.
        assert all(gradient.stride() == w.stride() for gradient, w in zip(got[2:], matrices, strict=True))


def test_rows_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter copies each storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    counts = [3, 66, 0, 0, 1]
    x, *weights = swiglu.inputs(70, torch.float16, (16, 16))
    dout, found = torch.randn(70, 16, dtype=torch.float16), []
    for rows, gradient in ((x, dout), (far_rows(x.detach()).requires_grad_(), far_rows(dout))):
        out = grouped_swiglu(rows, *weights, counts=torch.tensor(counts))
        found.append([out, *torch.autograd.grad(out, (rows, *weights), gradient)])
    assert all(torch.equal(near, far) for near, far in zip(*found, strict=True))


def test_nothing_is_written_beyond_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in another order: rows that one writes beyond its tile stay, instead of being written again."""
    start = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: start(self, self.grid_dim[0] - 1 - x, y, z)
    )
    counts = [3, 33, 0, 16, 1]
    swiglu.check(swiglu.inputs(sum(counts), torch.float32, (16, 15)), counts)


def test_rows_after_the_last_are_neither_read_nor_written() -> None:
    """Inputs have NaN around them, on all sides; outputs another number."""
    counts = [3, 18, 0, 0, 1]
    x, weight, *_ = (t.detach() for t in swiglu.inputs(22, torch.float32, (40, 37)))
    expected = torch.einsum("nc,nfc->nf", x, weight[torch.arange(5).repeat_interleave(torch.tensor(counts))])
    given, dout = torch.full((40, 64), NAN), torch.full((40, 64), NAN)
    given[9:31, :40], dout[9:31, :37] = x, expected
    into, back = torch.full((40, 64), 7.0), torch.full((5, 48, 48), 7.0)
    experts, longest_first = ExpertRows.of(torch.tensor(counts)), torch.tensor([1, 0, 4, 2, 3])
    grouped.product(Rows.of(into[9:31, :37]), experts, 22, (Rows.of(given[9:31, :40]), weight.mT))
    assert relative_error(into[9:31, :37], expected) <= RELATIVE_TOLERANCE[torch.float32]
    of_rows = Rows.of(dout[9:31, :37]), Rows.of(given[9:31, :40])
    grouped.weight_gradient(back[:, :37, :40], experts, longest_first, *of_rows)
    wanted = torch.stack([a.t() @ b for a, b in zip(expected.split(counts), x.split(counts), strict=True)])
    assert relative_error(back[:, :37, :40], wanted) <= RELATIVE_TOLERANCE[torch.float32]
    assert int((into == 7.0).sum()) == into.numel() - 22 * 37
    assert int((back == 7.0).sum()) == back.numel() - 5 * 37 * 40


def test_rows_after_the_last_expert_have_none() -> None:
    swiglu.test_rows_after_the_last_expert_have_none(torch.float32)


def test_rows_of_other_experts_do_not_matter() -> None:
    """Rows of one expert are NaN: those of all others, and gradients of their weights, are the same bits."""
    counts, bad_expert = [5, 18, 0, 16, 1], 1
    rows = slice(5, 23)
    x, gate, up, down = swiglu.inputs(40, torch.float32, (16, 15))
    dout = torch.randn(40, 16)
    bad, bad_dout = x.detach().clone(), dout.clone()
    bad[rows], bad_dout[rows] = NAN, NAN
    bad.requires_grad_()
    found = []
    for rows_in, gradient in ((x, dout), (bad, bad_dout)):
        leaves = (rows_in, gate, up, down)
        out = grouped_swiglu(*leaves, counts=torch.tensor(counts))
        found.append([out, *torch.autograd.grad(out, leaves, gradient)])
    other_rows = [row for row in range(40) if row not in range(5, 23)]
    others = [expert for expert in range(5) if expert != bad_expert]
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(a[other_rows], b[other_rows])
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        assert torch.equal(a[others], b[others])
        assert b[bad_expert].isnan().all()


@pytest.mark.parametrize("case", gathered.CHOSEN)
def test_matrices_that_tokens_choose(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_linear, "on_gpu", lambda x: True)
    gathered.test_equals_every_matrix_on_every_token(case, torch.float32, 1e-5)


@pytest.mark.parametrize("tokens", [0, 50])
def test_rows_are_gathered_for_several_tiles(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the loop over matrices on a CPU does it; no token chooses matrix 1."""
    chosen = torch.rand(tokens, 4).argsort(dim=1)[:, :2]
    choices = Choices.of(chosen + (chosen > 0).long(), 5)
    leaves, found = [torch.randn(shape).requires_grad_() for shape in ((tokens, 20), (5, 37, 20), (5, 20, 37))], []
    (x, weight, back), dout = leaves, torch.randn(tokens, 20)
    for on_gpu in (True, False):
        monkeypatch.setattr(gathered_linear, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
        out = combine_chosen(project_chosen(x, weight, choices), back, choices)
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not any(gradient[1].any() for gradient in found[0][2:])

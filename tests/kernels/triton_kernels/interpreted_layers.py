"""RMS norm, rotary embedding and SwiGLU by Triton, interpreted, against formulas in float64.

`test_interpreted.py` runs this file in a process of its own. Tiles are small, so that few rows make several.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.layers import fused
from farspan.kernels.layers.norm import residual_rms_norm, rms_norm
from farspan.kernels.layers.rope import apply_rope, inverse_frequencies, rotate_queries_and_keys, rotation_table
from farspan.kernels.layers.swiglu import silu_product
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.triton_kernels import layers_launch
from farspan.trainer.model.attention import AttentionInputs
from farspan.trainer.model.transformer import Block
from tests.kernels.layers import test_norm, test_rope
from tests.support import triton_interpreter
from tests.support.mechanisms import normal
from tests.trainer.model.test_transformer import CONFIG

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
Function = Callable[..., Sequence[Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of relative errors in the 2-norm: one rounding of the result, by half a unit in the last place."""


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.patch()
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    for name, value in {"TILE_ELEMENTS": 512, "WEIGHT_PARTS": 3, "SWIGLU_ELEMENTS": 128}.items():
        monkeypatch.setattr(layers_launch, name, value)


def found(function: Function, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = function(*leaves)
    given = [dout.to(result.dtype) for dout, result in zip(upstream, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, given)]


def check(function: Function, formula: Function, leaves: Sequence[Tensor], bound: float) -> None:
    """Compare results and gradients with a formula's in float64; padding around the leaves is NaN."""
    exact = [leaf.double() for leaf in leaves]
    upstream = normal(*(result.shape for result in formula(*exact)), seed=7, dtype=leaves[0].dtype)
    padded = [functional.pad(leaf, (1, 1), value=torch.nan)[..., 1:-1] for leaf in leaves]
    ours, truth = found(function, padded, upstream), found(formula, exact, upstream)
    assert [x.dtype for x in ours[-len(leaves) :]] == [leaf.dtype for leaf in leaves]
    for number, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= bound * b.norm(), number


def test_norm_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of the layer, on the kernel: 165 rows of 70, a float32 weight, squares beyond float16, no rows."""
    monkeypatch.setattr(functional, "rms_norm", lambda *_: pytest.fail("not the kernel"))
    for dtype, bound in BOUND.items():
        test_norm.test_value_and_gradients(dtype, bound if dtype == torch.float32 else bound / 2)
    test_norm.test_float32_weight_is_not_rounded_to_bfloat16()
    test_norm.test_squares_do_not_overflow_float16()
    test_norm.test_zero_rows_and_zero_tokens()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 600), (13, 64), (37, 20), (0, 20)])
def test_norm_of_a_sum(rows: int, width: int, dtype: torch.dtype) -> None:
    """Gradients arrive at the sum and at the norm. Rows fill no tile, a part of one, tiles and a part."""
    x, delta, weight = normal((rows, width), (rows, width), (width,), dtype=dtype)

    def formula(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # The norm of the sum as it is rounded, whose rounding has no gradient.
        total = x + delta
        rounded = total + (total.to(dtype).to(total.dtype) - total).detach()
        return rounded, test_norm.formula(rounded, weight)

    # dx is rounded once, of a sum of two gradients.
    check(
        lambda x, delta, weight: residual_rms_norm(x, delta, weight, test_norm.EPS),
        formula,
        [x, delta, weight],
        BOUND[dtype],
    )


def test_a_norm_or_sum_without_a_gradient() -> None:
    x, delta, weight = (t.requires_grad_() for t in normal((5, 8), (5, 8), (8,), dtype=torch.float32))
    total, normed = residual_rms_norm(x, delta, weight, test_norm.EPS)
    of_total = torch.autograd.grad(total.sum(), (x, delta), retain_graph=True)
    assert all(torch.equal(gradient, torch.ones(5, 8)) for gradient in of_total)
    expected = torch.autograd.grad(rms_norm(total.detach().requires_grad_(), weight, test_norm.EPS).sum(), weight)
    assert torch.equal(torch.autograd.grad(normed.sum(), weight)[0], expected[0])


def test_norm_beside_a_residual_stream() -> None:
    """Without a sum the stream passes as it is, and its gradient is added to that of the norm."""
    x, weight = normal((5, 8), (8,), dtype=torch.float32)

    def formula(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x, test_norm.formula(x, weight)

    check(lambda x, weight: residual_rms_norm(x, None, weight, test_norm.EPS), formula, [x, weight], 3e-7)
    stream, _ = residual_rms_norm(x, None, weight, test_norm.EPS)
    assert stream.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "rotated"), [(19, 16, 16), (8, 12, 6), (3, 20, 4), (0, 8, 8)])
def test_rotation(tokens: int, width: int, rotated: int, dtype: torch.dtype) -> None:
    """Partly rotated heads, half a head that is no power of 2, other numbers of heads of q and k."""
    position = torch.randint(1 << 20, (tokens,), generator=torch.Generator().manual_seed(1))
    cos, sin = rotation_table(position, inverse_frequencies(rotated, 10_000.0, test_rope.YARN_16), 1.25)
    q, k = normal((tokens, 5, width), (tokens, 2, width), dtype=dtype)

    def formula(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    check(lambda q, k: rotate_queries_and_keys(q, k, cos, sin), formula, [q, k], BOUND[dtype])


def test_rotation_of_heads_that_are_apart() -> None:
    """Heads before tokens in memory, as some gradients of attention come; the results are contiguous."""
    x, y = normal((9, 3, 10), (9, 1, 10), dtype=torch.float32)
    table = rotation_table(torch.arange(9), inverse_frequencies(4, 10_000.0))
    other = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (x, y)]
    expected, got = rotate_queries_and_keys(x, y, *table), rotate_queries_and_keys(other[0], other[1], *table)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(expected, got, strict=True))


def test_rotation_leaves_the_rest_of_a_head_as_it_is() -> None:
    x, y = normal((9, 3, 10), (9, 1, 10), dtype=torch.bfloat16)
    table = rotation_table(torch.arange(9), inverse_frequencies(4, 10_000.0))
    q, k = rotate_queries_and_keys(x, y, *table)
    assert torch.equal(q[..., 4:], x[..., 4:])
    assert torch.equal(k[..., 4:], y[..., 4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 37), (1, 128), (2, 3, 64), (0, 5)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = normal(shape, shape, dtype=dtype)
    check(lambda *leaves: [silu_product(*leaves)], lambda g, u: [functional.silu(g) * u], [3 * gate, up], BOUND[dtype])


@pytest.mark.parametrize("parallel", [False, True], ids=["in turn", "parallel"])
def test_a_block_equals_that_of_a_cpu(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole block in float32, with norms of heads; its attention returns queries and keys."""
    torch.manual_seed(0)
    config = replace(CONFIG, qk_norm=True, parallel_blocks=parallel)
    block = Block(config, Dense(), has_experts=False, recompute=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    cos, sin = rotation_table(torch.arange(11), inverse_frequencies(6, 10_000.0))
    attention: Any = lambda q, k, v: q + (k + v).repeat_interleave(2, dim=1)  # noqa: E731
    inputs = AttentionInputs(torch.ones(11, dtype=torch.bool), cos, sin, attention, None)
    x, dout = normal((11, 12), (11, 12), dtype=torch.float32)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out, *_ = block(leaf, inputs, None)
        return [out, *torch.autograd.grad(out, (leaf, *block.parameters()), dout)]

    ours = run()
    counted: list[str] = []
    kernels = layers_launch.kernels
    for name in ("rms_norm_kernel", "rms_norm_backward_kernel", "rope_kernel", "silu_product_kernel"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, _Counted(launch, counted, name))
    run()
    norms = 3 if parallel else 4
    assert {name: counted.count(name) for name in counted} == {
        "rms_norm_kernel": 2 * norms, "rms_norm_backward_kernel": norms, "rope_kernel": 3, "silu_product_kernel": 2,
    }  # fmt: skip
    monkeypatch.setattr(fused, "on_gpu", lambda x: False)
    for number, (a, b) in enumerate(zip(ours, run(), strict=True)):
        assert (a - b).norm() <= 1e-6 * b.norm(), number


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, counted: list[str], name: str) -> None:
        self.kernel, self.counted, self.name = kernel, counted, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.counted.append(self.name)
        return self.kernel[grid]

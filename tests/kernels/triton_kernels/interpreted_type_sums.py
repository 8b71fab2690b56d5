"""Sums over pairs and the gradient of types, interpreted, against the loop over tiles that a CPU takes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention import attention_forward
from farspan.kernels.lifetimes import gradient
from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import attention_launch
from farspan.kernels.triton_kernels.attention_launch import Shape, Shapes
from tests.support import triton_interpreter
from tests.support.attention_cases import Tensors
from tests.support.oracle import assert_close

SHAPES = Shapes(forward=Shape(32, 32, 4, 1), dq=Shape(32, 16, 4, 1), dkv=Shape(16, 32, 4, 1))
RAGGED = Rows.packed([1, 26, 3, 33], padding=5)
PART = RAGGED.take(torch.arange(20, 68))
# Padding, of any positions, in a tile of queries that sees all of a tile of keys; and queries that are in the window of
# keys, but behind the next global tokens.
LONG = Rows(position=torch.arange(80).int(), document=-(torch.arange(80) >= 76).int())
SHUFFLED = Rows.packed([40, 21], padding=3).take(torch.randperm(64, generator=torch.Generator().manual_seed(0)))
# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.patch()
    monkeypatch.setattr(attention_launch, "shapes_for", lambda *_: SHAPES)
    monkeypatch.setattr(attention_launch, "PLACES", 16)


def random_lifetimes(rows: Rows, window: int) -> Lifetimes:
    """Two KV heads, the second with few global tokens."""
    generator = torch.Generator().manual_seed(3)
    types = torch.randint(0, 3, (len(rows), 2), generator=generator)
    few = torch.randint(0, 9, (len(rows),), generator=generator) > 0
    types[few & (types[:, 1] == 0), 1] = 1
    return Lifetimes.of(types.to(torch.int8), DocumentOrder.of(rows), window)


# Hidden scores overflow, and padding is not finite, before the mask drops them.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("rows", "keys", "window"),
    [(RAGGED, RAGGED, 4), (LONG, LONG, 40), (SHUFFLED, SHUFFLED, 30), (RAGGED, PART, 2**40)],
    ids=["ragged", "long", "shuffled", "part of the keys"],
)
def test_sums_over_pairs(rows: Rows, keys: Rows, window: int) -> None:
    lifetimes = random_lifetimes(rows, window)
    if len(keys) != len(rows):
        lifetimes = replace(lifetimes, columns=lifetimes.columns[..., 20:68])
    q, k, v, dout = Tensors.random(len(rows), len(keys), (4, 2), (16, 24), torch.float32)
    plan = Plan.build(rows, keys, AttentionMask(), heads=4)
    # A hidden pair overflows, and what padding holds must not matter.
    q[3, :, 0], k[10, :, 0] = 100.0, 40.0
    out, lse = attention_forward(q, k, v, plan, backend="cpu")
    dout[rows.document < 0] = float("nan")
    k[keys.document < 0] = float("inf")
    given = dout, q, k, v, out, lse
    expected = gradient.pair_sums(*given, plan=plan, lifetimes=lifetimes)
    got = attention_launch.pair_sums(*given, plan=plan, lifetimes=lifetimes)
    for found, right in zip(got, expected, strict=True):
        assert_close([found], [right], 1e-5)
    assert all(x.abs().amax(dim=(0, 1)).count_nonzero() for x in expected)


def random_sums(tokens: int) -> Tensor:
    return torch.randn(tokens, 2, gradient.SUMS, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("rows", [RAGGED, SHUFFLED, Rows.packed([]), Rows.packed([], padding=2)], ids=str)
def test_the_gradient_of_types(rows: Rows) -> None:
    """In steps of 16 tokens, which runs between global tokens span."""
    order, lifetimes, sums = DocumentOrder.of(rows), random_lifetimes(rows, 4), random_sums(len(rows))
    got = attention_launch.type_gradient(sums, lifetimes, order)
    expected = gradient.type_gradient(sums, lifetimes, order)
    assert got.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

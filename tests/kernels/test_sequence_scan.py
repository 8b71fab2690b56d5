"""A recurrence over full sequences whose rows come in any order, against autograd of the formula.

`test_sequence_attention.py` has all recurrences for some or all heads; here are orders and lengths that it lacks.
"""

import pytest
import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.sequence_attention import SequenceScan
from tests.support.oracle import RELATIVE_TOLERANCE, decayed_sums, relative_error

CPU = torch.device("cpu")
ABLE = [n for n, b in BACKENDS.load().items() if b.unavailable_reason(CPU) is None and isinstance(b, RecurrentBackend)]
PACKED = Rows.packed([50, 1, 130], padding=3)
ROWS = {
    "packed": PACKED,
    "shuffled": PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0))),
    "padding_first": PACKED.take(torch.arange(len(PACKED)).flip(0)),
    "nothing": Rows.packed([]),
}


def draw(rows: Rows, dtype: torch.dtype, heads: tuple[int, int] = (8, 2)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], 16), (heads[1], 16), (heads[1], 8), (heads[0], 8)]
    return [torch.randn(len(rows), *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", list(RELATIVE_TOLERANCE), ids=str)
@pytest.mark.parametrize("order", ROWS)
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", Lightning.examples(), ids=str)
def test_rows_in_any_order(mechanism: Lightning, backend: str, order: str, dtype: torch.dtype) -> None:
    rows, decay = ROWS[order], mechanism.decay(8)
    q, k, v, dout = draw(rows, dtype)
    planned = SequenceScan.build(rows, decay, backend=backend)
    out, saved = planned.forward(q, k, v)
    assert out.dtype == dtype
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = decayed_sums(leaves[0], leaves[1], leaves[2], decay, rows)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    pairs = zip((out, *planned.backward(dout, saved)), (expected.detach(), *gradients), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= RELATIVE_TOLERANCE[dtype]


def test_rows_in_order_are_not_moved() -> None:
    assert SequenceScan.build(PACKED, torch.zeros(1), backend="cpu").order is None
    assert SequenceScan.build(ROWS["shuffled"], torch.zeros(1), backend="cpu").order is not None

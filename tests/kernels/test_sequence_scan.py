"""A recurrence over full sequences whose rows come in any order, against autograd of the formula.

`test_sequence_attention.py` has all recurrences for some or all heads; here are orders and lengths that it lacks.
"""

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.planner import Heads
from farspan.kernels.sequence_attention import SequenceScan
from tests.support.mechanisms import inputs_of
from tests.support.oracle import RELATIVE_TOLERANCE, assert_close, decayed_sums

CPU = torch.device("cpu")
ABLE = [n for n, b in BACKENDS.load().items() if b.unavailable_reason(CPU) is None and isinstance(b, RecurrentBackend)]
PACKED = Rows.packed([50, 1, 130], padding=3)
ROWS = {
    "packed": PACKED,
    "shuffled": PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0))),
    "padding_first": PACKED.take(torch.arange(len(PACKED)).flip(0)),
    "nothing": Rows.packed([]),
}


@pytest.mark.parametrize("dtype", list(RELATIVE_TOLERANCE), ids=str)
@pytest.mark.parametrize("order", ROWS)
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", Lightning.examples(), ids=str)
def test_rows_in_any_order(mechanism: Lightning, backend: str, order: str, dtype: torch.dtype) -> None:
    rows, decay = ROWS[order], mechanism.decay(8)
    *inputs, dout = inputs_of(mechanism, len(rows), Heads(query=8, kv=2), dtype=dtype)
    planned = SequenceScan.build(rows, decay, backend=backend)
    out, saved = planned.forward(*inputs)
    assert out.dtype == dtype
    q, k, v = leaves = [x.double().requires_grad_() for x in inputs]
    expected = decayed_sums(q, k, v, decay, rows)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    assert_close((out, *planned.backward(dout, saved)), (expected, *gradients), RELATIVE_TOLERANCE[dtype])


def test_rows_in_order_are_not_moved() -> None:
    assert SequenceScan.build(PACKED, torch.zeros(1), backend="cpu").order is None
    assert SequenceScan.build(ROWS["shuffled"], torch.zeros(1), backend="cpu").order is not None

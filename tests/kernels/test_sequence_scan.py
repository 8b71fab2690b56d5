"""A recurrence over full sequences in any order, under autograd of the formula, for some or all heads."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.sequence_attention import SequenceScan
from tests.support.oracle import RELATIVE_TOLERANCE, relative_error

CPU = torch.device("cpu")
ABLE = [
    n
    for n in BACKENDS
    if BACKENDS.get(n).unsupported_reason(CPU) is None and BACKENDS.get(n).scan_unsupported_reason() is None
]
PACKED = Rows.packed([50, 1, 130], padding=3)
ROWS = {
    "packed": PACKED,
    "shuffled": PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0))),
    "padding_first": PACKED.take(torch.arange(len(PACKED)).flip(0)),
    "strided": Rows.packed([160]).take(torch.arange(1, 160, 2)),
    "nothing": Rows.packed([]),
}


def draw(rows: Rows, dtype: torch.dtype, heads: tuple[int, int] = (8, 2)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], 16), (heads[1], 16), (heads[1], 8), (heads[0], 8)]
    return [torch.randn(len(rows), *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, rows: Rows, decay: Tensor) -> Tensor:
    distance = rows.position[:, None] - rows.position[None, :]
    sees = (rows.document[:, None] == rows.document[None, :]) & (distance >= 0) & (rows.document >= 0)[:, None]
    group = q.shape[1] // k.shape[1]
    outs = [
        ((q[:, h] @ k[:, h // group].t()) * torch.where(sees, decay[h].neg().exp() ** distance, 0.0)) @ v[:, h // group]
        for h in range(q.shape[1])
    ]
    return torch.stack(outs, dim=1)


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
    expected = formula(leaves[0], leaves[1], leaves[2], rows, decay)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    pairs = zip((out, *planned.backward(dout, saved)), (expected.detach(), *gradients), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= RELATIVE_TOLERANCE[dtype]


def test_rows_in_order_are_not_moved() -> None:
    assert SequenceScan.build(PACKED, torch.zeros(1), backend="cpu").order is None
    assert SequenceScan.build(ROWS["shuffled"], torch.zeros(1), backend="cpu").order is not None


def test_some_of_the_heads_are_a_slice_of_all() -> None:
    """As under Ulysses: a rank has query heads 4 to 8 and their KV head, with the rates that they have among all."""
    rows, decay = ROWS["shuffled"], Lightning().decay(8)
    q, k, v, dout = draw(rows, torch.float64)
    all_heads = SequenceScan.build(rows, decay, backend="cpu")
    some = SequenceScan.build(rows, decay[4:8], backend="cpu")
    out, saved = all_heads.forward(q, k, v)
    my_out, my_saved = some.forward(q[:, 4:8], k[:, 1:], v[:, 1:])
    assert relative_error(my_out, out[:, 4:8]) <= 1e-13
    dq, dk, dv = all_heads.backward(dout, saved)
    mine = some.backward(dout[:, 4:8], my_saved)
    for a, b in zip(mine, (dq[:, 4:8], dk[:, 1:], dv[:, 1:]), strict=True):
        assert relative_error(a, b) <= 1e-13

"""What strategies and backends build on, for every mechanism that a plan describes.

`test_sequence_attention.py` compares all mechanisms with the formula.
"""

import pytest
import torch

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.merge import empty_partial, merge_
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.attention_cases import ABLE, ROWS, Tensors, check, examples, mask_and_selection, run


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", examples(Masked))
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(mechanism: Mechanism, backend: str) -> None:
    """The two facts that every strategy that moves keys relies on."""
    rows = Rows.packed([30, 60, 5], padding=4)
    t = Tensors.random(len(rows), len(rows), (8, 2), 16, 16, torch.float64)
    attention_mask, selection = mask_and_selection(mechanism, t, rows)
    all_keys = run(t, Plan.build(rows, rows, attention_mask, heads=8, selection=selection), backend)
    # Three parts; the queries of the first document see nothing of the last.
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plans = [
        Plan.build(rows, rows.take(part), attention_mask, heads=8, selection=selection, shortest_run=8)
        for part in parts
    ]
    out, lse = empty_partial(len(rows), 8, 16, like=t.q)
    for part, plan in zip(parts, plans, strict=True):
        merge_(out, lse, *attention_forward(t.q, t.k[part], t.v[part], plan, backend=backend))
    dq, dk, dv = (torch.zeros_like(x) for x in (t.q, t.k, t.v))
    for part, plan in zip(parts, plans, strict=True):
        gradients = attention_backward(t.dout, t.q, t.k[part], t.v[part], out, lse, plan, backend=backend)
        dq += gradients[0]
        dk[part], dv[part] = gradients[1], gradients[2]
    for got, expected in zip((out, lse, dq, dk, dv), all_keys, strict=True):
        assert oracle.relative_error(got, expected) <= oracle.RELATIVE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mechanism", examples(Routed))
def test_batches_are_split_over_threads(mechanism: Mechanism, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run on one thread; the number only changes how the batches of a selection are split.
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in (ROWS["ragged"], ROWS["strided"]):
        tensors = Tensors.random(len(rows), len(rows), (8, 2), 16, 8, torch.float64)
        attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
        check(tensors, rows, rows, attention_mask, "cpu", selection)

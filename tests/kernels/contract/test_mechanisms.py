"""What strategies and backends build on, for every mechanism that a plan describes.

`test_sequence_attention.py` compares all mechanisms with the formula.
"""

import pytest
import torch

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planning.plan import Plan
from tests.support.attention_cases import ABLE, ROWS, Tensors, check, mask_and_selection, run, run_parts
from tests.support.mechanisms import examples
from tests.support.oracle import assert_close


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", examples(Masked), ids=str)
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(mechanism: Mechanism, backend: str) -> None:
    """The two facts that every strategy that moves keys relies on."""
    rows = Rows.packed([30, 60, 5], padding=4)
    tensors = Tensors.random(len(rows), len(rows), (8, 2))
    attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
    # Three parts; the queries of the first document see nothing of the last.
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plan, *plans = (
        Plan.build(rows, keys, attention_mask, heads=8, selection=selection, shortest_run=8)
        for keys in (rows, *(rows.take(part) for part in parts))
    )
    assert_close(run_parts(tensors, parts, plans, backend), run(tensors, plan, backend))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mechanism", examples(Routed), ids=str)
def test_batches_are_split_over_threads(mechanism: Mechanism, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run on one thread; the number only changes how the batches of a selection are split.
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in (ROWS["ragged"], ROWS["strided"]):
        tensors = Tensors.random(len(rows), len(rows), (8, 2), (16, 8))
        attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
        check(tensors, rows, rows, attention_mask, "cpu", selection)

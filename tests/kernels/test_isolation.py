"""What reaches which rows, row by row; that it holds for attention is tested with every mechanism."""

import pytest
import torch

from farspan.kernels import isolation
from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.isolation import LARGEST_PADDING, Isolation, bad_rows
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from tests.support import attention_cases as contract


@pytest.mark.parametrize("causal", [True, False])
def test_a_bad_row_reaches_what_may_depend_on_it(causal: bool) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    queries = Rows.packed([7, 1, 9], padding=3).take(order)
    keys = Rows.packed([7, 2, 9], padding=2)
    found = Isolation.of(queries, keys, causal=causal)
    assert found is not None
    later = queries.position[:, None] >= keys.position if causal else torch.ones(20, 20, dtype=torch.bool)
    # [queries, keys]
    sees = (queries.document[:, None] == keys.document) & (keys.document >= 0) & later
    for row in range(20):
        bad = torch.arange(20) == row
        assert torch.equal(found.queries_after(bad), sees[:, row])
        assert torch.equal(found.keys_before(bad), sees[row])
    assert torch.equal(found.queries_after(sees[3]), sees[:, sees[3]].any(dim=1))
    assert torch.equal(found.keys_before(sees[:, 3]), sees[sees[:, 3]].any(dim=0))


def test_one_document_needs_none() -> None:
    rows, padding = Rows.packed([7]), Rows.packed([7], padding=1)
    assert Isolation.of(rows, rows, causal=True) is None
    assert Isolation.of(rows, padding, causal=True) is not None


def test_bad_rows() -> None:
    """Not finite or, in padding, huge; the formula for a device says the same as that for a CPU."""
    x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 0, 3], x[2, 1, 0], x[3, 0, 0], x[4, 1, 7], x[5, 0, 1] = torch.nan, torch.inf, -torch.inf, -1e30, -1e30
    limit = torch.tensor([torch.inf] * 5 + [LARGEST_PADDING])
    assert bad_rows(limit, torch.zeros_like(x), x).tolist() == [False, True, True, True, False, True]
    largest, of_device = isolation._largest(x), torch.linalg.vector_norm(x, torch.inf, dim=(1, 2))
    assert torch.equal(largest.nan_to_num(7), of_device.nan_to_num(7))
    assert torch.equal(largest.isnan(), of_device.isnan())


@pytest.mark.parametrize("backend", contract.ABLE)
def test_queries_that_are_drawn_from_a_plan_stay_apart_from_other_documents(backend: str) -> None:
    """As those of other ranks are, by the blocks that they chose."""
    rows = Rows.packed([6, 5])
    index, blocks = torch.tensor([9, 2, 5, 10]), BlockPartition.blocks(rows, 4)
    # Each chooses its own block.
    chosen = BlockSelection(
        heads=1, query_block=torch.arange(4), blocks=blocks, offsets=torch.arange(5),
        key_blocks=blocks.of(rows)[index].int(),
    )  # fmt: skip
    drawn = Plan.build(rows, rows, AttentionMask(), heads=1).draw(index, chosen)
    q, k, v, dout = contract.Tensors.random(4, 11, heads=(1, 1))
    v[7] = torch.nan
    out, lse = attention_forward(q, k, v, drawn, backend=backend)
    dq, _, dv = attention_backward(dout, q, k, v, out, lse, drawn, backend=backend)
    assert [x.isfinite().flatten(1).all(1).tolist() for x in (out, dq)] == [[False, True, True, False]] * 2
    assert dv[:6].isfinite().all()

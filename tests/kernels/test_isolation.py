"""What reaches which rows, row by row; that it holds for attention is tested with every mechanism."""

import pytest
import torch

from farspan.kernels import isolation
from farspan.kernels.isolation import LARGEST_PADDING, Isolation, bad_rows
from farspan.kernels.masks.rows import Rows


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

"""Numbers of rows that ranks read from each other, by hand; test_key_convolution.py checks which rows."""

import pytest

from farspan.kernels.masks.rows import Rows
from farspan.parallel.context_parallel.key_convolution import Halo, mean_rows_sent
from farspan.parallel.layout import LAYOUTS, Shards


@pytest.mark.parametrize("reach", [2, 4])
def test_rows_by_hand(reach: int) -> None:
    """One document of 96 tokens on 4 ranks."""
    shards = {layout: Shards.build(Rows.packed([96]), layout=layout, degree=4) for layout in LAYOUTS}
    rows = {
        # Each rank but the last gives its end to the next.
        "contiguous": [reach, reach, reach, 0],
        # Of 8 chunks each but the last gives its end to the next, unless the same rank has it: rank 3 has the 4th
        # and the 5th.
        "zigzag": [reach, 2 * reach, 2 * reach, reach],
        # A row goes to the ranks of the rows after it, but for the end of the document; at most all three others.
        "striped": [48, 48, 47, 46] if reach == 2 else [72, 71, 70, 69],
    }
    for layout, expected in rows.items():
        plans = [Halo.plan(shards[layout], rank, reach) for rank in range(4)]
        assert [sum(plan.sent) for plan in plans] == expected, layout
        assert sum(sum(plan.received) for plan in plans) == sum(expected)
        assert [len(plan.rows) for plan in plans] == [sum(plan.received) for plan in plans]
        assert mean_rows_sent(shards[layout], reach) == -(-sum(expected) // 4)
    # The first rank sends rows; the last one sends none, and returns the gradients of its halo.
    first, last = (Halo.plan(shards["contiguous"], rank, reach) for rank in (0, 3))
    assert (sum(first.sent), sum(first.received)) == (reach, 0)
    assert (sum(last.sent), sum(last.received)) == (0, reach)


def test_documents_that_ranks_do_not_share_send_nothing() -> None:
    shards = Shards.build(Rows.packed([24] * 4), layout="contiguous", degree=4)
    assert all(Halo.plan(shards, rank, 4).is_empty for rank in range(4))
    assert mean_rows_sent(shards, 4) == 0

"""States of sequences longer than those of the matrix; there, equality and bytes of all layouts and degrees."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.rows import Rows
from farspan.kernels.whole import plan_whole
from farspan.parallel.comm import Channel
from farspan.parallel.layout import LAYOUTS, Shards
from farspan.parallel.simulation import simulate
from farspan.parallel.strategy import STRATEGIES
from tests.oracle import relative_error

HEADS = Heads(query=4, kv=2)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("degree", [1, 2])
def test_what_comes_later_is_not_heard_however_far_it_is(degree: int, layout: str) -> None:
    """The fastest rate is 1/4: exp(s n) of 8192 tokens is beyond float64."""
    rows, generator = Rows.packed([8192]), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8192, heads, 2, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    shards = Shards.deal(rows, layout=layout, degree=degree)

    def attend(channel: Channel) -> Tensor:
        planned = STRATEGIES.get("state")(channel).prepare(Lightning(), shards, HEADS, backend="cpu")
        return planned.forward(*(shards.shard(x, channel.rank) for x in (q, k, v)))[0]

    out = shards.unshard(torch.stack(simulate(degree, attend)))
    alone, _ = plan_whole(Lightning(), rows, HEADS, range(4), backend="cpu").forward(q, k, v)
    assert relative_error(out, alone) <= 1e-10

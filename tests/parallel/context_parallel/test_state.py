"""States of sequences longer than those of the matrix; there, equality and bytes of all layouts and degrees."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.comm import Channel, Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes, Volume
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.oracle import relative_error
from tests.support.simulation import simulate

HEADS = Heads(query=4, kv=2)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("degree", [1, 2])
def test_what_comes_later_is_not_heard_however_far_it_is(degree: int, layout: str) -> None:
    """The fastest rate is 1/4: exp(s n) of 8192 tokens is beyond float64."""
    rows, generator = Rows.packed([8192]), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8192, heads, 2, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    shards = Shards.build(rows, layout=layout, degree=degree)

    def attend(channel: Channel) -> Tensor:
        planned = STRATEGIES.get("state")(channel).prepare(Lightning(), shards, HEADS, backend="cpu")
        return planned.forward(*(shards.shard(x, channel.rank) for x in (q, k, v)))[0]

    out = shards.unshard(torch.stack(simulate(degree, attend)))
    alone, _ = plan_sequence_attention(Lightning(), rows, HEADS, range(4), backend="cpu").forward(q, k, v)
    assert relative_error(out, alone) <= 1e-10


def error(rows: Rows, layout: str, degree: int) -> float:
    """Return the largest error of out, dq, dk and dv of simulated ranks, against one process."""
    generator, shards = torch.Generator().manual_seed(0), Shards.build(rows, layout=layout, degree=degree)
    *inputs, dout = (torch.randn(len(rows), n, 2, generator=generator, dtype=torch.float64) for n in (4, 2, 2, 4))

    def attend(channel: Channel) -> tuple[Tensor, ...]:
        planned = STRATEGIES.get("state")(channel).prepare(Lightning(), shards, HEADS, backend="cpu")
        out, saved = planned.forward(*(shards.shard(x, channel.rank) for x in inputs))
        return out, *planned.backward(shards.shard(dout, channel.rank), saved)

    found = [shards.unshard(torch.stack(part)) for part in zip(*simulate(degree, attend), strict=True)]
    whole = plan_sequence_attention(Lightning(), rows, HEADS, range(4), backend="cpu")
    out, saved = whole.forward(*inputs)
    return max(map(relative_error, found, (out, *whole.backward(dout, saved))))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("degree", [2, 3])
def test_stretches_of_one_token_or_none(degree: int, layout: str) -> None:
    """Short sequences leave the last ranks such: what a token leaves behind is not heard by itself."""
    for tokens in range(1, 8):
        assert error(Rows.packed([tokens]), layout, degree) <= 1e-10, f"{tokens} tokens"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_rows_in_any_order(layout: str) -> None:
    rows = Rows.packed([50, 1, 30], padding=5)
    shuffled = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    assert error(shuffled, layout, 3) <= 1e-10


@pytest.mark.parametrize(
    ("layout", "stretches", "redealt"), [("contiguous", 1, 0), ("zigzag", 2, 0), ("striped", 1, 1024 * 7 // 8)]
)
def test_volumes_by_hand(layout: str, stretches: int, redealt: int) -> None:
    """1024 tokens on each of 8 ranks: a float32 matrix a head and stretch; bfloat16 rows of such as are dealt anew."""
    shards = Shards.build(Rows.packed([8192]), layout=layout, degree=8)
    planned = STRATEGIES.get("state")(Unconnected(3, 8)).prepare(Lightning(), shards, HEADS, backend="cpu")
    sums, rows = 7 * stretches * 4 * 64 * 32 * 4, redealt * (4 * 64 + 2 * (64 + 32) + 4 * 32) * 2
    assert planned.volume(Sizes.of(torch.bfloat16, 64, 32)) == Volume(forward=sums + rows, backward=sums + rows)


def test_layers_of_one_sequence_have_its_stretches_in_common() -> None:
    """Rates differ by layer, stretches do not; another sequence, dealt alike, has its own."""
    strategy = STRATEGIES.get("state")(Unconnected(0, 2))
    first, second = (Shards.build(Rows.packed(lengths), layout="zigzag", degree=2) for lengths in ([9, 23], [30, 2]))
    planned = [
        strategy.prepare(Lightning(layer=layer, layers=3), shards, HEADS, backend="cpu")
        for shards in (first, second)
        for layer in range(2)
    ]
    stretches = [attend.stretches for attend in planned]  # pyright: ignore[reportAttributeAccessIssue]
    assert stretches[0] is stretches[1]
    assert stretches[2] is stretches[3]
    assert [len(segment) for segment in stretches[0]] == [len(segment) for segment in stretches[2]] == [8, 8]
    assert stretches[0][1].last != stretches[2][1].last
    assert not torch.equal(planned[0].influence, planned[1].influence)  # pyright: ignore[reportAttributeAccessIssue]

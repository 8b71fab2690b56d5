"""States of sequences that are longer, shorter or less sorted than those of the matrix."""

import pytest
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes, Volume
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.mechanisms import attend, inputs_of
from tests.support.oracle import assert_close
from tests.support.simulation import simulate_attention

HEADS = Heads(query=4, kv=2)


def check(rows: Rows, layout: str, degree: int) -> None:
    """Compare simulated ranks with one process."""
    shards, inputs = Shards.build(rows, layout=layout, degree=degree), inputs_of(Lightning(), len(rows), HEADS, (2, 2))
    found = simulate_attention("state", Lightning(), shards, HEADS, inputs).tensors
    assert_close(found, attend(Lightning(), rows, HEADS, inputs, backend="cpu"), 1e-10)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("degree", [1, 2])
def test_later_tokens_have_no_influence_however_far_they_are(degree: int, layout: str) -> None:
    """The fastest rate is 1/4: exp(s n) of 8192 tokens is beyond float64."""
    check(Rows.packed([8192]), layout, degree)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("degree", [2, 3])
def test_segments_of_one_token_or_none(degree: int, layout: str) -> None:
    """Short sequences leave them to the last ranks: the state of a token has no influence on the token."""
    for tokens in range(1, 8):
        check(Rows.packed([tokens]), layout, degree)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_rows_in_any_order(layout: str) -> None:
    rows = Rows.packed([50, 1, 30], padding=5)
    shuffled = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    check(shuffled, layout, 3)


@pytest.mark.parametrize(
    ("layout", "segments", "resharded"), [("contiguous", 1, 0), ("zigzag", 2, 0), ("striped", 1, 1024 * 7 // 8)]
)
def test_volumes_by_hand(layout: str, segments: int, resharded: int) -> None:
    """1024 tokens on each of 8 ranks: a float32 matrix per head and segment; bfloat16 rows if resharded."""
    shards = Shards.build(Rows.packed([8192]), layout=layout, degree=8)
    planned = STRATEGIES.get("state")(Unconnected(3, 8)).prepare(Lightning(), shards, HEADS, backend="cpu")
    sums, rows = 7 * segments * 4 * 64 * 32 * 4, resharded * (4 * 64 + 2 * (64 + 32) + 4 * 32) * 2
    assert planned.volume(Sizes.of(torch.bfloat16, 64, 32)) == Volume(forward=sums + rows, backward=sums + rows)


def test_layers_of_one_sequence_share_its_segments() -> None:
    """Decay differs by layer, segments do not; another sequence of the same layout has its own."""
    strategy = STRATEGIES.get("state")(Unconnected(0, 2))
    first, second = (Shards.build(Rows.packed(lengths), layout="zigzag", degree=2) for lengths in ([9, 23], [30, 2]))
    planned = [
        strategy.prepare(Lightning(layer=layer, layers=3), shards, HEADS, backend="cpu")
        for shards in (first, second)
        for layer in range(2)
    ]
    segments = [attention.segments for attention in planned]  # pyright: ignore[reportAttributeAccessIssue]
    assert segments[0] is segments[1]
    assert segments[2] is segments[3]
    assert [[len(segment) for _, segment in of.local] for of in (segments[0], segments[2])] == [[8, 8], [8, 8]]
    assert segments[0].local[1][1].last != segments[2].local[1][1].last
    assert not torch.equal(planned[0].influence.host, planned[1].influence.host)  # pyright: ignore[reportAttributeAccessIssue]

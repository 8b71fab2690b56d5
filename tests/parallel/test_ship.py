"""Queries that travel to the keys they chose: what moves, against a ring, and in worlds of many ranks."""

import pytest
import torch

from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.rows import Rows
from farspan.parallel.choice import typical_choice
from farspan.parallel.layout import Shards
from farspan.parallel.simulation import Unconnected
from farspan.parallel.strategy import STRATEGIES, Sizes

TOKENS, BLOCK = 1 << 14, 128


def sent(strategy: str, degree: int, heads: Heads, top_k: int) -> int:
    """Return the bytes that all ranks send in a bfloat16 layer with heads of 64, forward."""
    mechanism, rows = MoBA(block=BLOCK, top_k=top_k), Rows.packed([TOKENS])
    shards = Shards.deal(rows, layout="contiguous", degree=degree)
    chosen = typical_choice(mechanism, rows, heads) if strategy == "ship" else None
    total = 0
    for rank in range(0, degree, max(degree // 4, 1)):
        channel = Unconnected(rank, degree)
        planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="cpu")
        total += planned.volume(Sizes.of(torch.bfloat16, 64, 64), chosen).forward
    return total


@pytest.mark.parametrize(
    ("degree", "heads", "top_k", "ships"),
    [
        # Up to K - 1 other ranks per query: K = 3 moves 2 x (12 + 4 + 128 + 260) bytes per head, the ring 31 x 256.
        (32, Heads(query=4, kv=4), 3, True),
        # Of 4 query heads to a KV head each moves for itself, still less than 31 chunks.
        (32, Heads(query=4, kv=1), 3, True),
        # At 4 ranks the ring sends 3 x 256 for 4 heads, and queries 4 times as much as above.
        (4, Heads(query=4, kv=1), 3, False),
        (8, Heads(query=4, kv=1), 8, False),
    ],
)
def test_less_moves_than_around_a_ring_where_the_formula_says_so(
    degree: int, heads: Heads, top_k: int, ships: bool
) -> None:
    """Published, for results as wide as queries: when degree - 1 > (Hq / Hk) (K - 1).

    Ours come back in float32: 404 bytes an item where a key and a value have 256.
    """
    condition = degree - 1 > (heads.query / heads.kv) * (top_k - 1) * 404 / 256
    assert condition == ships
    assert (sent("ship", degree, heads, top_k) < sent("ring", degree, heads, top_k)) == ships

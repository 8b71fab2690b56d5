"""Worlds beyond the matrix: degrees that are no power of two, sparse ids, and what is refused before it runs.

Found by an independent fuzzer; thousands of its random cases agreed with one process.
"""

import itertools

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.spans import Spans
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.matrix import inner_size_for
from tests.support.mechanisms import inputs_of
from tests.support.simulation import simulate_attention


@pytest.mark.parametrize("degree", [3, 5, 6])
@pytest.mark.parametrize("name", [name for name in MECHANISMS if issubclass(MECHANISMS.get(name), Masked)])
def test_bytes_where_the_degree_divides_nothing(name: str, degree: int) -> None:
    """Each rank sends 2 (P-1)/P of what is all-reduced, rounded down once, however many all-reduces there are."""
    rows, heads, mechanism = Rows.packed([200]), Heads(query=8, kv=2), MECHANISMS.get(name).examples()[0]
    shards = Shards.build(rows, layout="zigzag", degree=degree)
    found = simulate_attention("ring", mechanism, shards, heads, inputs_of(mechanism, 200, heads, (4, 4)))
    assert found.sent == [plan.volume(Sizes.of(torch.float64, 4, 4)) for plan in found.plans]


@pytest.mark.parametrize(
    ("mechanism", "heads", "message"),
    [
        (Dense(), Heads(query=5, kv=2), "5 query heads cannot share 2 KV heads evenly"),
        (Spans(alpha=(4.0,) * 8, beta=(0.0,) * 8, length=64), Heads(query=4, kv=2), "8 windows for 4 query heads"),
        (BlockSparse(block=8, mask=("1", "11")), Heads(query=4, kv=2), "mask has 2 tiles, but a document has 4"),
    ],
    ids=["heads", "windows", "mask"],
)
@pytest.mark.parametrize("strategy", ["ring", "gather", "fetch", "hybrid", "ulysses"])
def test_what_does_not_fit_is_refused_before_it_runs(
    strategy: str, mechanism: Mechanism, heads: Heads, message: str
) -> None:
    shards = Shards.build(Rows.packed([32]), layout="contiguous", degree=4)
    with pytest.raises(ConfigError, match=message):
        STRATEGIES.get(strategy)(Unconnected(0, 4, inner_size=2)).prepare(mechanism, shards, heads, backend="cpu")


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "state"])
def test_the_longest_document_that_fits_runs_and_one_token_more_is_refused(strategy: str) -> None:
    mechanism, heads = BlockSparse(block=8, mask=("1", "11")), Heads(query=8, kv=4)
    degree = 1 if strategy == "single" else 4
    inner_size = inner_size_for(strategy, degree, turn=0)
    planning = STRATEGIES.get(strategy)(Unconnected(0, degree, inner_size=inner_size))
    for layout, lengths in itertools.product(LAYOUTS, ([16], [3, 16, 5], [17], [3, 17, 16])):
        shards = Shards.build(Rows.packed(lengths, padding=20), layout=layout, degree=degree)
        if max(lengths) == 16:
            planning.prepare(mechanism, shards, heads, backend="cpu")
            continue
        with pytest.raises(ConfigError, match="mask has 2 tiles, but a document has 3"):
            planning.prepare(mechanism, shards, heads, backend="cpu")


@pytest.mark.parametrize("strategy", ["hybrid", "hybrid_outer", "double_ring"])
@pytest.mark.parametrize("inner", [0, 1, 3, 4])
def test_what_is_no_grid_is_refused(strategy: str, inner: int) -> None:
    unsupported_reason = STRATEGIES.get(strategy).unsupported_reason(Dense(), Heads(query=8, kv=8), 4, inner)
    assert unsupported_reason is not None
    assert "needs a grid of ranks" in unsupported_reason

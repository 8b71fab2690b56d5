"""Edges of the input, for every mechanism under every strategy: any ids, no tokens, numbers that are not finite."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.window import Window
from farspan.parallel.context_parallel.cost_model import MACHINES, Job, predict
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.matrix import (
    HEAD_DIM,
    TINY,
    VALUE_DIM,
    Case,
    differing_bytes,
    inner_size_for,
    one_process,
    run_cases,
    unshard,
)
from tests.support.mechanisms import SCORES, attend, inputs_of, with_scores
from tests.support.oracle import assert_close, tolerance
from tests.support.rank_pool import RankPool
from tests.support.simulation import simulate_attention

HEADS = Heads(query=8, kv=2)
EVERY = [name for name in STRATEGIES if name != "single"]
DEGREE = 4


def served(strategy: str) -> Iterator[tuple[Mechanism, str, int]]:
    """Yield the first example of each mechanism that a strategy takes, a layout, in turn, and the inner axis."""
    inner_size = inner_size_for(strategy, DEGREE, turn=0)
    for number, name in enumerate(MECHANISMS):
        example = MECHANISMS.get(name).examples()[0]
        if STRATEGIES.get(strategy).unsupported_reason(example, HEADS, DEGREE, inner_size) is None:
            yield example, list(LAYOUTS)[(number + EVERY.index(strategy)) % len(LAYOUTS)], inner_size


def on_ranks(
    strategy: str, mechanism: Mechanism, layout: str, inner_size: int, rows: Rows, inputs: list[Tensor]
) -> list[Tensor]:
    shards = Shards.build(rows, layout=layout, degree=DEGREE, work=mechanism.keys_per_query)
    return simulate_attention(strategy, mechanism, shards, HEADS, inputs, inner_size=inner_size).tensors


@pytest.mark.parametrize("strategy", EVERY)
def test_ids_of_documents_may_be_anything(strategy: str) -> None:
    """Up to the largest of int32; all negative ones are padding."""
    base = Rows.packed([40, 1, 27], padding=4)
    ids = torch.tensor([3, 1 << 28, (1 << 31) - 1, -7, -(1 << 31), -1, -2], dtype=torch.int32)
    number = torch.where(base.document < 0, torch.arange(len(base)) - 65, base.document)
    rows = Rows(position=base.position, document=ids[number.long()])
    assert rows.document[-4:].tolist() == [-7, -(1 << 31), -1, -2]
    for mechanism, _, inner_size in served(strategy):
        inputs = inputs_of(mechanism, len(rows), HEADS)
        found = on_ranks(strategy, mechanism, "balanced", inner_size, rows, inputs)
        assert_close(found, attend(mechanism, base, HEADS, inputs))
        assert torch.equal(mechanism.keys_per_query(rows), mechanism.keys_per_query(base))


@pytest.mark.parametrize("strategy", EVERY)
def test_ranks_and_documents_without_tokens(ranks: Callable[[int], RankPool], strategy: str) -> None:
    """Results, counted bytes and costs where there are fewer tokens than ranks, or none at all, in turns."""
    cases = [
        Case(mechanism, strategy, layout, documents, HEADS, inner_size)
        for number, (mechanism, layout, inner_size) in enumerate(served(strategy))
        for documents in list(TINY)[(number + EVERY.index(strategy)) % 2 :: 2]
    ]
    results = ranks(DEGREE).run(run_cases, cases)
    for number, case in enumerate(cases):
        found = unshard(case, [of_rank[number][0] for of_rank in results])
        assert_close(found, one_process(case.mechanism, case.documents, HEADS))
        assert not differing_bytes(case, [of_rank[number][1] for of_rank in results])
        sizes = Sizes.of(torch.float64, HEAD_DIM, VALUE_DIM)
        job = Job(
            mechanism=case.mechanism, shards=case.shards(DEGREE), heads=HEADS, sizes=sizes, inner_size=case.inner_size
        )
        assert predict(strategy, job, MACHINES["cpu"]).working_bytes >= 0
        assert case.mechanism.saved_bytes(HEADS, sizes, case.rows) >= 0


@pytest.mark.parametrize("strategy", EVERY)
def test_what_is_not_finite_stays_in_its_document_and_padding_reaches_nothing(strategy: str) -> None:
    """In the inputs and in the gradient of out, one after another; padding holds huge numbers, too."""
    rows = Rows.packed([37, 1, 50, 20], padding=9)
    padding, bad = rows.document < 0, rows.document == 2
    for number, (mechanism, layout, inner_size) in enumerate(served(strategy)):
        inputs = inputs_of(mechanism, len(rows), HEADS)
        spoiled = [x.clone() for x in inputs]
        for nth, x in enumerate(spoiled):
            x[padding] = (math.nan, math.inf, 1e38)[nth % 3]
        # Of a router's numbers those of padding only: others change what is chosen, in the document.
        of_attention = [spoiled[0], spoiled[1], spoiled[2], spoiled[-1]]
        of_attention[number % 4][bad] = (math.nan, math.inf)[number % 2]
        expected, found = (on_ranks(strategy, mechanism, layout, inner_size, rows, x) for x in (inputs, spoiled))
        for a, b in zip(found, expected, strict=True):
            assert_close([a[~bad]], [b[~bad]])
            assert not a[padding].masked_fill(a[padding].isneginf(), 0.0).any()
        assert not torch.cat([x[bad].flatten() for x in found]).isfinite().all()


OF_EACH_KIND = (Window, MoBA, SpargeAttention, MoSA, NAtS, Lightning)
"""Of routed ones by row and by tile."""


@pytest.mark.parametrize(("scores", "dtype"), [("huge", torch.float32), ("negative", torch.bfloat16)])
@pytest.mark.parametrize("strategy", EVERY)
def test_merges_of_scores_of_any_size(strategy: str, scores: str, dtype: torch.dtype) -> None:
    """Partial results that outweigh each other by exp(1e4), and log-sum-exps far below 0, forward and backward."""
    rows = Rows.packed([61, 1, 30], padding=5)
    for mechanism, layout, inner_size in served(strategy):
        if isinstance(mechanism, OF_EACH_KIND):
            inputs = with_scores(scores, inputs_of(mechanism, len(rows), HEADS, dtype=dtype))
            expected = attend(mechanism, rows, HEADS, [x.double() for x in inputs])
            found = on_ranks(strategy, mechanism, layout, inner_size, rows, inputs)
            assert_close(found, expected, tolerance(dtype, SCORES[scores]))

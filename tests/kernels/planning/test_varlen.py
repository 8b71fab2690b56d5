"""Rows cut into sequences of varlen calls: they hold each visible pair once, in few calls."""

import numpy as np
import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.varlen import MOST_CALLS, VarlenRows, VarlenSequence
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support import oracle

RANKS = 4
LENGTHS = [1, 30, 2, 57, 5, 1, 1, 40, 13]


def calls_of(found: VarlenRows) -> dict[tuple[int, bool], list[VarlenSequence]]:
    calls: dict[tuple[int, bool], list[VarlenSequence]] = {}
    for number, sequence in zip(found.number, found.sequences, strict=True):
        calls.setdefault((number, sequence.causal), []).append(sequence)
    return calls


def times_visible(found: VarlenRows, queries: int, keys: int) -> Tensor:
    """How often each (query, key) pair is computed, `[queries, keys]`, as a library computes packed sequences."""
    times = torch.zeros(queries, keys, dtype=torch.int64)
    for sequences in calls_of(found).values():
        call = found.call(sequences)
        rows, columns = torch.from_numpy(call.queries), torch.from_numpy(call.keys)
        assert len(rows.unique()) == len(rows)
        assert len(columns.unique()) == len(columns)
        for sequence in sequences:
            t, s = sequence.queries, sequence.keys
            assert min(t, s) > 0
            square = torch.ones(t, s, dtype=torch.int64).tril(s - t if call.causal else s)
            assert int(square.sum()) == sequence.pairs
            (here, rows), (there, columns) = rows.tensor_split([t]), columns.tensor_split([s])
            times[here[:, None], there] += square
        assert len(rows) == len(columns) == 0
    return times


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "gathered", "shuffled", "every second"])
def test_each_visible_pair_is_computed_once(layout: str, causal: bool) -> None:
    """Of every rank's queries and every part's keys; padding of each rank is at its end."""
    rows, attention_mask = Rows.packed(LENGTHS), AttentionMask(causal=causal)
    if layout in LAYOUTS:
        shards = Shards.build(rows, layout=layout, degree=RANKS)
        parts = [rows.take(index) for index in shards.index]
        pairs = [(queries, keys) for queries in parts for keys in parts]
    elif layout == "gathered":
        shards = Shards.build(rows, layout="zigzag", degree=RANKS)
        pairs = [(rows.take(index), rows.take(torch.cat(tuple(shards.index)))) for index in shards.index]
    elif layout == "every second":
        rows = Rows.packed([9, 14, 2])
        pairs = [(rows.take(torch.arange(1, 25, 2)), rows), (rows, rows.take(torch.arange(0, 25, 2)))]
    else:
        shuffled = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
        pairs = [(shuffled, shuffled), (rows, shuffled), (shuffled, Rows.packed([], padding=3))]
    for queries, keys in pairs:
        found = VarlenRows.of(queries, keys, causal=causal)
        assert found is not None
        expected = oracle.visible_mask(queries, keys, attention_mask, 1)[0]
        assert torch.equal(times_visible(found, len(queries), len(keys)), expected.long())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_documents_of_a_layout_are_one_call(layout: str) -> None:
    rows = Rows.packed([1_000] * 125)
    parts = [rows.take(index) for index in Shards.build(rows, layout=layout, degree=8).index]
    for queries in (rows, *parts):
        for keys in [rows] if queries is rows else parts:
            found = VarlenRows.of(queries, keys, causal=True)
            assert found is not None
            assert len(calls_of(found)) <= 1
    if layout != "striped":
        # Two chunks of a rank may see different parts of one document, if all keys are there.
        found = [VarlenRows.of(queries, rows, causal=True) for queries in parts]
        assert max(len(calls_of(x)) for x in found if x is not None) <= 2
        assert None not in found


def test_rows_that_need_too_many_calls_are_none() -> None:
    """Each query sees one key more or none: sequences of one or two queries."""
    rows = Rows.packed([400])
    chosen = torch.from_numpy(np.random.default_rng(0).random(400) < 0.5)
    queries, keys = (rows.take(x.nonzero().squeeze(1)) for x in (chosen, ~chosen))
    assert VarlenRows.of(queries, keys, causal=True) is None
    assert VarlenRows.of(queries, keys, causal=False) is not None
    # One step more or less decides.
    blocks = torch.arange(400) // 10 % 2 == 0
    few = 20 * MOST_CALLS
    for stop, possible in ((few, True), (few + 20, False)):
        queries, keys = (rows.take(x[:stop].nonzero().squeeze(1)) for x in (~blocks, blocks))
        assert (VarlenRows.of(queries, keys, causal=True) is not None) == possible

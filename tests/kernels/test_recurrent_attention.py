"""Recurrent attention beside its contract: refusals, and cases that only the chunked CPU recurrence has."""

import math

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.linear_attention.state import NO_POSITION, Segment, SequencePosition, State
from farspan.kernels.masks.rows import Rows
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from tests.support.oracle import assert_close, relative_error
from tests.support.recurrence_contract import ROWS, Case


def test_every_backend_that_runs_here_has_a_file_of_its_contract() -> None:
    cpu = torch.device("cpu")
    able = {n for n, b in BACKENDS.load().items() if isinstance(b, RecurrentBackend) and not b.unavailable_reason(cpu)}
    assert able == {"cpu", "reference"}


@pytest.mark.parametrize("tokens", [63, 64, 65, 2047, 2048, 2049, 2112, 2113])
def test_lengths_around_chunks_and_blocks(tokens: int) -> None:
    case = Case.random(Rows.packed([tokens // 3, tokens - tokens // 3]), (2, 1), (8, 4), decay=torch.tensor([0.0, 0.1]))
    assert_close(case.run("cpu"), case.run("reference"))


def test_thousands_of_tiny_documents() -> None:
    """5,000 documents, written out one by one; rates of 0 let anything that leaks through."""
    lengths = [1 + i % 4 for i in range(5_000)]
    rows = Rows.packed(lengths)
    case = Case.random(rows, (2, 1), (8, 4), decay=torch.zeros(2, dtype=torch.float64), last=NO_POSITION)
    out = case.run("cpu")[0]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for document in (0, 1, 31, 32, 2_499, 4_998, 4_999):
        of = slice(starts[document], starts[document + 1])
        # One KV head: q [T, 2, D] x k [S, D] -> [2, T, S], times v [S, Dv] -> [T, 2, Dv].
        scores = torch.einsum("thd,sd->hts", case.q[of], case.k[of, 0]).tril()
        assert relative_error(out[of], torch.einsum("hts,sd->thd", scores, case.v[of, 0])) <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "4 query heads cannot"),
        ({"k": torch.zeros(5, 2, 4)}, "a recurrence wants q"),
        ({"v": torch.zeros(4, 2, 8)}, "the segment has 5 rows|a recurrence wants q"),
        ({"segment": Segment.of(Rows.packed([6]))}, "the segment has 6 rows"),
        ({"q": torch.zeros(5, 4, 8).double()}, "one dtype"),
        ({"decay": torch.zeros(3)}, "each of 4 query heads"),
        ({"decay": torch.tensor([1.0, 1.0, -0.1, 1.0])}, "a finite rate of decay"),
        ({"decay": torch.tensor([1.0, 1.0, math.nan, 1.0])}, "a finite rate of decay"),
        ({"decay": torch.tensor([1.0, 1.0, math.inf, 1.0])}, "a finite rate of decay"),
        ({"state": State(torch.zeros(4, 8, 7), NO_POSITION)}, "the state must be"),
        ({"state": State(torch.zeros(4, 8, 8).double(), NO_POSITION)}, "the state must be"),
        ({"state": State(torch.zeros(4, 8, 8), SequencePosition(0, 0))}, "not before the segment"),
        ({"dout": torch.zeros(5, 4, 7)}, "dout"),
        ({"dstate": torch.zeros(4, 8, 7)}, "dstate"),
    ],
)
def test_bad_inputs_are_refused(change: dict, message: str) -> None:
    given = {
        "dout": torch.zeros(5, 4, 8),
        "dstate": None,
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "segment": Segment.of(Rows.packed([5])),
        "decay": torch.ones(4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        recurrent_attention_backward(**given, backend="reference")


def test_a_backend_without_recurrences_is_refused() -> None:
    case = Case.random(ROWS["one"])
    with pytest.raises(ConfigError, match=r"attention\.backend='cuda' has softmax attention only"):
        recurrent_attention_forward(case.q, case.k, case.v, case.segment, case.decay, backend="cuda")

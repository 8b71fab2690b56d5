"""The Triton recurrence, interpreted, against the formula in float64; `test_interpreted.py` runs this file.

Spans are short, so that a few hundred rows have several of several chunks, and the last of each is cut. Tiles of
float32 and float16 are large, as the interpreter's time follows their number; those of bfloat16 are the product's, and
all are as wide as the product's.
"""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import GridExecutor  # pyright: ignore[reportMissingImports]

from farspan.kernels.linear_attention.state import NO_POSITION, Segment, SequencePosition, State
from farspan.kernels.masks.rows import Rows
from farspan.kernels.recurrent_attention import recurrent_attention_forward
from farspan.kernels.triton_kernels import linear_attention
from tests.support import triton_interpreter
from tests.support.far_rows import far_rows
from tests.support.oracle import assert_close, relative_error, rms_error
from tests.support.recurrence_contract import NAMES, Case, later_rows

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


WIDEST = {dtype: max(tilings) for dtype, tilings in linear_attention.TILINGS.items()}


@pytest.fixture(autouse=True)
def _few_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.patch()
    monkeypatch.setattr(linear_attention, "CHUNKS_PER_SPAN", 2)
    for like in (torch.float32, torch.float16):
        monkeypatch.setitem(linear_attention.TILINGS, like, {WIDEST[like]: linear_attention.Tiling(32, 64, 8, 1)})


def check(
    rows: Rows,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    last: SequencePosition | None = None,
) -> None:
    """Compare with the formula in float64.

    16 bits are rounded on the way in and out of each product: weights, scores and states, and results once more.
    """
    decay = torch.tensor([0.02, 0.0, 1.0, 1e4], dtype=torch.float64)[: heads[0]]
    case = Case.random(rows, heads, dims, dtype, decay, last)
    if dtype == torch.float32:
        assert_close(case.run("triton"), case.expect(), 1e-4)
        return
    for name, got, expected in zip(NAMES, case.run("triton"), case.expect(), strict=True):
        assert rms_error(got, expected) < torch.finfo(dtype).eps / 2, name


def test_float32_with_documents_cut_by_spans() -> None:
    check(later_rows([40, 1, 2, 90], 50, padding=3), (4, 2), (32, 16))


def test_one_key_head_and_unequal_head_sizes() -> None:
    check(later_rows([133], 50), (4, 1), (48, 80))


def test_several_column_slices() -> None:
    check(later_rows([70], 50), (1, 1), (16, 192))


def test_gaps_and_a_state_of_another_document() -> None:
    rows = Rows.packed([100, 200]).take(torch.arange(1, 300, 3))
    check(rows, (2, 2), (16, 16), last=SequencePosition(7, 3))


def test_tiny_documents() -> None:
    check(Rows.packed([1 + i % 4 for i in range(40)]), (2, 1), (16, 16), last=NO_POSITION)


def test_padding_only_and_a_single_token() -> None:
    check(Rows.packed([], padding=5), (2, 1), (16, 16), last=SequencePosition(0, 3))
    check(later_rows([1], 50), (2, 1), (16, 16))


def test_rows_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter copies each storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    case = Case.random(Rows.packed([70]), (1, 1), (16, 16), torch.float16, torch.full((1,), 0.1))
    far = replace(case, **{name: far_rows(getattr(case, name)) for name in ("q", "k", "v", "dout")})
    for name, got, near in zip(NAMES, far.run("triton"), case.run("triton"), strict=True):
        assert torch.equal(got, near), name


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        *(((64, 64), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((dims, torch.bfloat16) for dims in ((128, 128), (192, 128), (256, 256))),
        ((128, 128), torch.float32),
        ((192, 128), torch.float32),
        ((256, 256), torch.float16),
    ],
    ids=str,
)
def test_head_sizes_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(later_rows([70], 50), (2, 1), dims, dtype)


def test_bfloat16_with_documents_and_shared_heads() -> None:
    check(later_rows([100, 60], 50), (4, 2), (64, 64), torch.bfloat16)


def test_float16_does_not_overflow_inside() -> None:
    """q k of 16 x 100 x 100 is more than float16 holds; times v of 0.001 it is not."""
    q, v = torch.full((5, 1, 16), 100.0).half(), torch.full((5, 1, 16), 1e-3).half()
    decay, state = torch.ones(1, dtype=torch.float64), State(torch.zeros(1, 16, 16), NO_POSITION)
    out, _ = recurrent_attention_forward(q, q, v, Segment.of(Rows.packed([5])), decay, state, backend="triton")
    expected = 160 * torch.exp(-torch.arange(5.0)).sum()  # of the last row
    assert relative_error(out[-1], expected.expand(1, 16)) < 2.0**-9

"""Checks of the Triton recurrence, to be called where TRITON_INTERPRET=1 was set before Triton was imported.

Spans are short, so that a few hundred rows have several of several chunks, and the last of each is cut. Tiles of
float32 and float16 are large, as the interpreter's time follows their number; those of bfloat16 are the product's, and
all are as wide as the product's.
"""

import pytest
import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import NO_POSITION, Segment, SequencePosition, State
from farspan.kernels.masks.rows import Rows
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from farspan.kernels.triton_kernels import linear_attention
from tests.support import interpreter_bfloat16
from tests.support.oracle import relative_error, rms_error

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_as_it_is() -> None:
    interpreter_bfloat16.patch()


WIDEST = {dtype: max(tilings) for dtype, tilings in linear_attention.TILINGS.items()}
NAMES = ("out", "state", "dq", "dk", "dv", "dstate")


def both(
    rows: Rows, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, last: SequencePosition | None = None
) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name, Triton's, the reference's in float64) of all results of the forward and backward passes."""
    linear_attention.CHUNKS_PER_SPAN = 2
    for like in (torch.float32, torch.float16):
        linear_attention.TILINGS[like] = {WIDEST[like]: linear_attention.Tiling(32, 64, 8, 1)}
    generator, tokens = torch.Generator().manual_seed(0), len(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v, dout = (
        draw(tokens, h, d).to(dtype)
        for h, d in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    )
    segment = Segment.of(rows)
    last = last or SequencePosition(segment.first.document, segment.first.position - 2)
    value, dstate = draw(heads[0], *dims), draw(heads[0], *dims)
    decay = torch.tensor([0.02, 0.0, 1.0, 1e4], dtype=torch.float64)[: heads[0]]
    found, ends = [], []
    for backend, wide in (("triton", False), ("reference", True)):
        of_q, of_k, of_v, of_dout, of_value, of_dstate = (
            x.double() if wide else x for x in (q, k, v, dout, value, dstate)
        )
        inputs = of_q, of_k, of_v, segment, decay, State(of_value, last)
        out, after = recurrent_attention_forward(*inputs, backend=backend)
        found.append([out, after.value, *recurrent_attention_backward(of_dout, of_dstate, *inputs, backend=backend)])
        ends.append(after.last)
    assert ends[0] == ends[1]
    return list(zip(NAMES, *found, strict=True))


def begun_before(lengths: list[int], padding: int = 0) -> Rows:
    rows = Rows.packed(lengths, padding=padding)
    return Rows(position=rows.position + 50 * (rows.document == 0).int(), document=rows.document)


def close(results: list[tuple[str, Tensor, Tensor]], tolerance: float) -> None:
    errors = {name: relative_error(got, expected) for name, got, expected in results}
    assert max(errors.values()) <= tolerance, errors


def check_float32_with_documents_cut_by_spans() -> None:
    close(both(begun_before([40, 1, 2, 90], padding=3), (4, 2), (32, 16), torch.float32), 1e-4)


def check_one_key_head_and_unequal_head_sizes() -> None:
    close(both(begun_before([133]), (4, 1), (48, 80), torch.float32), 1e-4)


def check_several_column_slices() -> None:
    close(both(begun_before([70]), (1, 1), (16, 192), torch.float32), 1e-4)


def check_gaps_and_a_state_of_another_document() -> None:
    rows = Rows.packed([100, 200]).take(torch.arange(1, 300, 3))
    close(both(rows, (2, 2), (16, 16), torch.float32, SequencePosition(7, 3)), 1e-4)


def check_tiny_documents() -> None:
    close(both(Rows.packed([1 + i % 4 for i in range(40)]), (2, 1), (16, 16), torch.float32, NO_POSITION), 1e-4)


def check_padding_only_and_a_single_token() -> None:
    close(both(Rows.packed([], padding=5), (2, 1), (16, 16), torch.float32, SequencePosition(0, 3)), 1e-4)
    close(both(begun_before([1]), (2, 1), (16, 16), torch.float32), 1e-4)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def check_head_sizes_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """16 bits are rounded on the way in and out of each product: weights, scores and states, and results once more."""
    results = both(begun_before([70]), (2, 1), dims, dtype)
    if dtype == torch.float32:
        close(results, 1e-4)
        return
    for name, got, expected in results:
        assert rms_error(got, expected) < torch.finfo(dtype).eps / 2, name


def check_float16_does_not_overflow_inside() -> None:
    """q k of 16 x 100 x 100 is more than float16 holds; times v of 0.001 it is not."""
    q, v = torch.full((5, 1, 16), 100.0).half(), torch.full((5, 1, 16), 1e-3).half()
    decay, state = torch.ones(1, dtype=torch.float64), State(torch.zeros(1, 16, 16), NO_POSITION)
    out, _ = recurrent_attention_forward(q, q, v, Segment.of(Rows.packed([5])), decay, state, backend="triton")
    expected = 160 * torch.exp(-torch.arange(5.0)).sum()  # of the last row
    assert relative_error(out[-1], expected.expand(1, 16)) < 2.0**-9


def check_bfloat16_with_documents_and_shared_heads() -> None:
    for name, got, expected in both(begun_before([100, 60]), (4, 2), (64, 64), torch.bfloat16):
        assert rms_error(got, expected) < torch.finfo(torch.bfloat16).eps / 2, name

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""The sweep of `kernels/linear_attention/recurrence.py` in Triton, in three phases, and the scan and its gradients made
of sweeps.

Rows are cut into segments, as many as fill the device, so that states take little memory at any length. First each
segment's own update of the state, all at once; then, by one small product, the states before all segments; then the
outputs, all segments at once, each walking its chunks with the state in registers (chunks as in Lightning Attention-2,
arXiv 2401.04658, section 3.2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.linear_attention.recurrence import scan_backward_by_sweeps, scan_by_sweep
from farspan.kernels.linear_attention.segment import Segment, SequencePosition
from farspan.kernels.linear_attention.state import State
from farspan.kernels.merge import accumulation_dtype

LOG2E = 1.4426950408889634
PROGRAMS = 528
"""Four for each of an H100's 132 multiprocessors."""
CHUNKS_PER_SEGMENT = 8
"""At least: below, the states cost more than the rows."""


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State
) -> tuple[Tensor, State]:
    """See `farspan.kernels.recurrent_attention.scan`; float32, bfloat16 or float16."""
    return scan_by_sweep(sweep, q, k, v, segment, decay, state)


def scan_backward(
    dout: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.recurrent_attention.scan_backward`; float32, bfloat16 or float16."""
    return scan_backward_by_sweeps(sweep, dout, dstate, q, k, v, segment, decay, state)


class Tiling(NamedTuple):
    """Rows of a chunk, columns of b that a program takes, and its warps and stages."""

    chunk: int
    columns: int
    warps: int
    stages: int


TILINGS = {
    torch.bfloat16: {64: Tiling(64, 64, 4, 2), 128: Tiling(64, 64, 8, 3), 256: Tiling(64, 32, 8, 2)},
    torch.float16: {64: Tiling(64, 32, 8, 1), 128: Tiling(32, 32, 8, 1), 256: Tiling(16, 16, 8, 1)},
    torch.float32: {64: Tiling(16, 32, 8, 1), 128: Tiling(16, 16, 8, 1)},
}
"""By dtype and the largest width of a: what compiles for sm_90 without spilled registers; float32 of 256 is cut in two.

float16 is multiplied as TF32, which holds it exactly and does not overflow; float32 in full, which is for checks.
"""


def tiling_of(a: Tensor, b: Tensor) -> Tiling:
    """Return how rows `[T, heads, A]` and `[T, heads, B]` are cut."""
    tiling = TILINGS[a.dtype][next(width for width in TILINGS[a.dtype] if a.shape[2] <= width)]
    return tiling._replace(columns=min(tiling.columns, max(triton.next_power_of_2(b.shape[2]), 16)))


def sweep(
    x: Tensor, a: Tensor, b: Tensor, segment: Segment, decay: Tensor, carried: State, *, from_end: bool
) -> tuple[Tensor, State]:
    """See `farspan.kernels.linear_attention.recurrence.Sweep`."""
    # Outputs are sums over the columns of a, each of which has rows of the state of its own.
    columns = max(TILINGS[a.dtype])
    cut = zip(x.split(columns, 2), a.split(columns, 2), carried.value.split(columns, 1), strict=True)
    parts = [
        _sweep(x_part, a_part, b, segment, decay, State(value, carried.place), from_end=from_end)
        for x_part, a_part, value in cut
    ]
    out, left = parts[0]
    for more, state in parts[1:]:
        out += more
        left = State(torch.cat((left.value, state.value), 1), left.place)
    return out, left


def _sweep(
    x: Tensor, a: Tensor, b: Tensor, segment: Segment, decay: Tensor, carried: State, *, from_end: bool
) -> tuple[Tensor, State]:
    """See `sweep`; a has no more columns than a tiling takes."""
    heads, shared, dtype = len(decay), len(decay) // x.shape[1], accumulation_dtype(x.dtype)
    out = torch.empty(x.shape[0], x.shape[1], b.shape[2], dtype=dtype if shared > 1 else x.dtype, device=x.device)
    out[segment.tokens :] = 0
    if not segment.tokens:
        return out, carried
    tiling = tiling_of(a, b)
    x, a, b = (t if t.stride(2) == 1 else t.contiguous() for t in (x, a, b))
    slices = triton.cdiv(b.shape[2], tiling.columns)
    segment_rows = _segment_rows(segment.tokens, tiling.chunk, x.shape[1] * slices)
    points = _points(segment, segment_rows, carried.place, from_end)
    count, on_device = len(points) - 1, torch.tensor(points, dtype=torch.int32).t().contiguous().to(x.device)
    rate = (decay.double() * LOG2E).float().to(x.device)
    states = carried.value.new_empty(heads, count + 1, a.shape[2], b.shape[2])
    states[:, 0] = carried.value
    places = (segment.rows.position.to(x.device), segment.rows.document.to(x.device), on_device[1], on_device[0])
    constants = {
        "tokens": segment.tokens,
        "segment_rows": segment_rows,
        "HEADS": heads,
        "A_HEADS": a.shape[1],
        "A_WIDTH": a.shape[2],
        "B_WIDTH": b.shape[2],
        "PADDED_A": max(triton.next_power_of_2(a.shape[2]), 16),
        "COLUMNS": tiling.columns,
        "CHUNK": tiling.chunk,
        "FROM_END": from_end,
        "PRECISION": "tf32" if x.dtype == torch.float16 else "ieee",
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    strides = (*a.stride()[:2], *b.stride()[:2])
    segment_updates[(count, heads, slices)](a, b, states, *places, rate, *strides, count + 1, **constants)
    states = (_between(points, decay).to(states) @ states.flatten(2)).view_as(states)
    for member in range(shared):
        segment_outputs[(count, heads // shared, slices)](
            x, a, b, out, states, *places, rate, *x.stride()[:2], *strides, *out.stride()[:2], count + 1, member,
            X_HEADS=x.shape[1], SHARED=shared, ADD=member > 0, **constants,
        )  # fmt: skip
    return out, State(states[:, -1].clone(), points[-1])


def _segment_rows(tokens: int, chunk: int, programs_per_segment: int) -> int:
    """Return the rows of a segment: a multiple of the chunk."""
    segments = max(PROGRAMS // programs_per_segment, 1)
    return chunk * max(triton.cdiv(triton.cdiv(tokens, chunk), segments), CHUNKS_PER_SEGMENT)


def _points(segment: Segment, segment_rows: int, start: SequencePosition, from_end: bool) -> list[SequencePosition]:
    """Return the places that states are of: the one carried here, then the last swept row of each segment."""
    swept = [min(end, segment.tokens) - 1 for end in range(segment_rows, segment.tokens + segment_rows, segment_rows)]
    rows = [segment.tokens - 1 - row if from_end else row for row in swept]
    index = torch.tensor(rows, device=segment.rows.position.device)
    columns = (segment.rows.document[index].tolist(), segment.rows.position[index].tolist())
    return [start, *(SequencePosition(*place) for place in zip(*columns, strict=True))]


def _between(points: list[SequencePosition], decay: Tensor) -> Tensor:
    """Return how the update at each point weighs in the states at later points, `[heads, points, points]`."""
    document, position = torch.tensor(points, dtype=torch.float64).t()
    distance = (position[:, None] - position[None, :]).abs()
    weight = torch.exp(-decay.double().cpu()[:, None, None] * distance)
    return weight.masked_fill(document[:, None] != document[None, :], 0.0).tril()


@triton.jit
def _load(
    pointer, row, head, row_stride, head_stride, there, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Load rows `[chunk, COLUMNS]` of a head, 0 where there are none; sums that bfloat16 cannot hold take float32."""
    column = first + tl.arange(0, COLUMNS)
    at = pointer + row.to(tl.int64)[:, None] * row_stride + head.to(tl.int64) * head_stride + column[None, :]
    rows = tl.load(at, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
    return rows if pointer.dtype.element_ty == tl.bfloat16 else rows.to(tl.float32)


@triton.jit
def _faded(rate, distance, meets):
    """Return exp(-s |distance|) where rows meet, else 0; rate: s log2(e)."""
    return tl.where(meets, tl.math.exp2(-rate * tl.abs(distance).to(tl.float32)), 0.0)


@triton.jit
def _places(position, document, swept, end, tokens, FROM_END: tl.constexpr):
    """Return (row, whether there is one, its position, its document) of rows counted in the order of the sweep."""
    there = swept < end
    row = tokens - 1 - swept if FROM_END else swept
    at = tl.load(position + row, mask=there, other=0)
    return row, there, at, tl.load(document + row, mask=there, other=-2)


@triton.jit
def segment_updates(
    a, b, states, position, document, point_position, point_document, rates, a_row, a_head, b_row, b_head, points,
    tokens, segment_rows, HEADS: tl.constexpr, A_HEADS: tl.constexpr, A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr,
    PADDED_A: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, FROM_END: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what the rows of a segment add to the state at its last row, into `states` `[heads, points, A, B]`."""
    segment, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS
    shared_head = head * A_HEADS // HEADS
    rate = tl.load(rates + head)
    last_position, last_document = tl.load(point_position + segment + 1), tl.load(point_document + segment + 1)
    start = segment * segment_rows
    end = tl.minimum(start + segment_rows, tokens)
    update = tl.zeros((PADDED_A, COLUMNS), tl.float32)
    for chunk in range(start, end, CHUNK):
        swept = chunk + tl.arange(0, CHUNK)
        row, there, at, of = _places(position, document, swept, end, tokens, FROM_END)
        a_rows = _load(a, row, shared_head, a_row, a_head, there, 0, A_WIDTH, PADDED_A)
        b_rows = _load(b, row, shared_head, b_row, b_head, there, first, B_WIDTH, COLUMNS)
        write = _faded(rate, last_position - at, of == last_document)
        weighted = (b_rows.to(tl.float32) * write[:, None]).to(b_rows.dtype)
        update = tl.dot(tl.trans(a_rows), weighted, update, input_precision=PRECISION)
    i, j = tl.arange(0, PADDED_A), first + tl.arange(0, COLUMNS)
    to = states + (head.to(tl.int64) * points + segment + 1) * A_WIDTH * B_WIDTH
    tl.store(to + i[:, None] * B_WIDTH + j[None, :], update, mask=(i < A_WIDTH)[:, None] & (j < B_WIDTH)[None, :])


@triton.jit
def segment_outputs(
    x, a, b, out, states, position, document, point_position, point_document, rates, x_row, x_head, a_row, a_head,
    b_row, b_head, out_row, out_head, points, member, tokens, segment_rows, HEADS: tl.constexpr,
    X_HEADS: tl.constexpr, A_HEADS: tl.constexpr, A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr,
    PADDED_A: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SHARED: tl.constexpr, ADD: tl.constexpr,
    FROM_END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write, or add to, out of a segment for the query head `member` of those that share a head of x."""
    segment, own_head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS
    head = own_head * SHARED + member
    shared_head = head * A_HEADS // HEADS
    rate = tl.load(rates + head)
    last_position, last_document = tl.load(point_position + segment), tl.load(point_document + segment)
    i, j = tl.arange(0, PADDED_A), first + tl.arange(0, COLUMNS)
    before = states + (head.to(tl.int64) * points + segment) * A_WIDTH * B_WIDTH
    inside = (i < A_WIDTH)[:, None] & (j < B_WIDTH)[None, :]
    state = tl.load(before + i[:, None] * B_WIDTH + j[None, :], mask=inside, other=0.0)
    start = segment * segment_rows
    end = tl.minimum(start + segment_rows, tokens)
    for chunk in range(start, end, CHUNK):
        swept = chunk + tl.arange(0, CHUNK)
        row, there, at, of = _places(position, document, swept, end, tokens, FROM_END)
        x_rows = _load(x, row, own_head, x_row, x_head, there, 0, A_WIDTH, PADDED_A)
        a_rows = _load(a, row, shared_head, a_row, a_head, there, 0, A_WIDTH, PADDED_A)
        b_rows = _load(b, row, shared_head, b_row, b_head, there, first, B_WIDTH, COLUMNS)
        found = tl.dot(x_rows, state.to(x_rows.dtype), input_precision=PRECISION)
        found *= _faded(rate, at - last_position, of == last_document)[:, None]
        meets = (of[:, None] == of[None, :]) & (swept[:, None] >= swept[None, :])
        scores = tl.dot(x_rows, tl.trans(a_rows), input_precision=PRECISION)
        scores *= _faded(rate, at[:, None] - at[None, :], meets)
        found = tl.dot(scores.to(b_rows.dtype), b_rows, found, input_precision=PRECISION)
        to = out + row.to(tl.int64)[:, None] * out_row + own_head.to(tl.int64) * out_head + j[None, :]
        kept = there[:, None] & (j < B_WIDTH)[None, :]
        if ADD:
            found += tl.load(to, mask=kept, other=0.0)
        tl.store(to, found, mask=kept)
        far = tl.minimum(chunk + CHUNK, end) - 1
        far = tokens - 1 - far if FROM_END else far
        next_position, next_document = tl.load(position + far), tl.load(document + far)
        state *= _faded(rate, next_position - last_position, next_document == last_document)
        write = _faded(rate, next_position - at, of == next_document)
        weighted = (b_rows.to(tl.float32) * write[:, None]).to(b_rows.dtype)
        state = tl.dot(tl.trans(a_rows), weighted, state, input_precision=PRECISION)
        last_position, last_document = next_position, next_document

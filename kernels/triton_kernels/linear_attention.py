# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
"""The chunked recurrence of `kernels/linear_attention/recurrence.py` in Triton, in three phases.

Rows are cut into spans, as many as fill the device, so that states take little memory at any length. First the update
of the state by each span alone, all at once; then, by one small product, the states before all spans; then the
outputs, all spans at once, each walking its chunks with the state in registers (chunks as in Lightning Attention-2,
arXiv 2401.04658, section 3.2).

    rows     | span 0         | span 1         | span 2    |
    points   0                1                2           3     where states are: `state.last`, then each span's end
    phase 1             update 1         update 2     update 3
    phase 2  state p = sum over p' <= p of exp(-s distance of p and p') update p', with update 0 the state before
    phase 3  outputs of span p from state p, chunk by chunk
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.linear_attention.state import RecurrenceInputs, Segment, SequencePosition, State
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import InputSpec
from farspan.kernels.triton_kernels.tile import Operand, padded

LOG2E = 1.4426950408889634
PROGRAMS = 528
"""Four for each of an H100's 132 multiprocessors."""
CHUNKS_PER_SPAN = 8
"""At least: with fewer, reading and writing states costs more than reading the rows."""


class Tiling(NamedTuple):
    """Rows of a chunk, columns of b that a program takes, warps and stages."""

    chunk: int
    columns: int
    warps: int
    stages: int


TILINGS = {
    torch.bfloat16: {64: Tiling(64, 64, 4, 2), 128: Tiling(64, 64, 8, 3), 256: Tiling(64, 32, 8, 2)},
    torch.float16: {64: Tiling(64, 32, 8, 1), 128: Tiling(32, 32, 8, 1), 256: Tiling(16, 16, 8, 1)},
    torch.float32: {64: Tiling(16, 32, 8, 1), 128: Tiling(16, 16, 8, 1)},
}
"""By dtype and the largest width of a: found by compiling for sm_90 without spilled registers; float32 has no width
of 256, so there a is cut in two. float16 is multiplied as TF32, which holds it exactly and does not overflow; float32
in full, which is for checks.
"""


def tiling_of(dtype: torch.dtype, a_width: int, b_width: int) -> Tiling:
    """Return the tiling for rows `[T, heads, a_width]` and `[T, heads, b_width]`."""
    tiling = TILINGS[dtype][next(width for width in TILINGS[dtype] if a_width <= width)]
    return tiling._replace(columns=min(tiling.columns, padded(b_width)))


def prepare(segment: Segment, decay: Tensor, before: SequencePosition, spec: InputSpec) -> None:
    """Make the tables of a forward and a backward pass after a state at `before`."""
    width, value_width, columns = spec.head_dim, spec.value_dim, max(TILINGS[spec.dtype])
    # The heads of x, the widths of a and b, and the direction: of out, dq, dk, dv.
    passes = (
        (len(decay), width, value_width, False),
        (len(decay), value_width, width, False),
        (spec.kv_heads, value_width, width, True),
        (spec.kv_heads, width, value_width, True),
    )
    for x_heads, a_width, b_width, reverse in passes:
        for of_part in {min(a_width, columns), a_width % columns or columns}:
            tiling = tiling_of(spec.dtype, of_part, b_width)
            span_rows = _span_rows(segment, tiling, x_heads, b_width)
            _tables(segment, span_rows, segment.last if reverse else before, reverse, decay, spec.device)


def chunked_recurrence(inputs: RecurrenceInputs, *, reverse: bool) -> tuple[Tensor, State]:
    """See `farspan.kernels.linear_attention.recurrence.ChunkedRecurrentBackend`; float32, bfloat16 or float16."""
    # Outputs are sums over the columns of a, and each column has a row of the state of its own.
    columns, last = max(TILINGS[inputs.k.dtype]), inputs.state.last
    # [T, heads, A] -> parts [T, heads, columns]; state [Hq, A, B] -> [Hq, columns, B]
    cut = zip(inputs.q.split(columns, 2), inputs.k.split(columns, 2), inputs.state.value.split(columns, 1), strict=True)
    parts = [_of_columns(replace(inputs, q=x, k=a, state=State(value, last)), reverse) for x, a, value in cut]
    out, after = parts[0]
    for more, of_part in parts[1:]:
        out += more
        after = State(torch.cat((after.value, of_part.value), 1), after.last)
    return out, after


def _of_columns(inputs: RecurrenceInputs, reverse: bool) -> tuple[Tensor, State]:
    """See `chunked_recurrence`; a has no more columns than a tiling takes."""
    x, a, b, segment, decay, state = inputs.q, inputs.k, inputs.v, inputs.segment, inputs.decay, inputs.state
    heads, shared, dtype = len(decay), len(decay) // x.shape[1], accumulation_dtype(x.dtype)
    out = torch.empty(x.shape[0], x.shape[1], b.shape[2], dtype=dtype if shared > 1 else x.dtype, device=x.device)
    out[segment.tokens :] = 0
    if not segment.tokens:
        return out, state
    tiling = tiling_of(x.dtype, a.shape[2], b.shape[2])
    slices = triton.cdiv(b.shape[2], tiling.columns)
    span_rows = _span_rows(segment, tiling, x.shape[1], b.shape[2])
    tables = _tables(segment, span_rows, state.last, reverse, decay, x.device)
    num_points = len(tables.points[0])
    states = state.value.new_empty(heads, num_points, a.shape[2], b.shape[2])
    states[:, 0] = state.value
    shared_arguments = tables.rows, tables.points, tables.rates, num_points, segment.tokens, span_rows
    constants = {
        "HEADS": heads,
        "A_HEADS": a.shape[1],
        "COLUMNS": tiling.columns,
        "CHUNK": tiling.chunk,
        "REVERSE": reverse,
        "PRECISION": "tf32" if x.dtype == torch.float16 else "ieee",
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    of_x, of_a, of_b, result = (Operand.of(t) for t in (x, a, b, out))
    span_updates[(num_points - 1, heads, slices)](of_a, of_b, states, *shared_arguments, **constants)
    # [heads, points, points] @ [heads, points, A * B] -> [heads, points, A, B]
    states = (tables.between.to(states) @ states.flatten(2)).view_as(states)
    # Query heads that share a head of x add to the same rows of out, so they run one after another.
    for member in range(shared):
        span_outputs[(num_points - 1, heads // shared, slices)](
            of_x, of_a, of_b, result, states, *shared_arguments, member, SHARED=shared, ADD=member > 0, **constants
        )
    return out, State(states[:, -1].clone(), tables.last)


def _span_rows(segment: Segment, tiling: Tiling, x_heads: int, b_width: int) -> int:
    spans = max(PROGRAMS // (x_heads * triton.cdiv(b_width, tiling.columns)), 1)
    return tiling.chunk * max(triton.cdiv(triton.cdiv(segment.tokens, tiling.chunk), spans), CHUNKS_PER_SPAN)


def _tables(
    segment: Segment, span_rows: int, before: SequencePosition, reverse: bool, decay: Tensor, device: torch.device
) -> "_Tables":
    key = "spans", device, span_rows, before, reverse, *decay.tolist()
    return once(segment.tables, key, lambda: _Tables.of(segment, span_rows, before, reverse, decay, device))


class _Tables(NamedTuple):
    """What kernels know of a segment, on their device: the same in all layers with equal rates of decay.

    rows, points: positions and documents, int32 `[T]` and `[points]`. rates: float32 `[heads]`, of powers of 2.
    between: see `_between`. last: the position of the last point.
    """

    rows: tuple[Tensor, Tensor]
    points: tuple[Tensor, Tensor]
    rates: Tensor
    between: Tensor
    last: SequencePosition

    @staticmethod
    def of(
        segment: Segment, span_rows: int, before: SequencePosition, reverse: bool, decay: Tensor, device: torch.device
    ) -> "_Tables":
        points = _points(segment, span_rows, before, reverse)
        # [points, 2] -> documents [points], positions [points]
        documents, positions = torch.tensor(points, dtype=torch.int32).t().contiguous()
        return _Tables(
            rows=(copy_to(segment.rows.position, device), copy_to(segment.rows.document, device)),
            points=(copy_to(positions, device), copy_to(documents, device)),
            rates=copy_to((decay.double() * LOG2E).float(), device),
            between=copy_to(_between(points, decay), device),
            last=points[-1],
        )


def _points(segment: Segment, span_rows: int, before: SequencePosition, reverse: bool) -> list[SequencePosition]:
    """Return the positions of the states: that of the given one, then the last row of each span."""
    steps = [min(end, segment.tokens) - 1 for end in range(span_rows, segment.tokens + span_rows, span_rows)]
    rows = [segment.tokens - 1 - row if reverse else row for row in steps]
    index = torch.tensor(rows, device=segment.rows.position.device)
    columns = (segment.rows.document[index].tolist(), segment.rows.position[index].tolist())
    return [before, *(SequencePosition(*point) for point in zip(*columns, strict=True))]


def _between(points: list[SequencePosition], decay: Tensor) -> Tensor:
    """Return the weight of the update at each point in the states at later points, `[heads, points, points]`."""
    document, position = torch.tensor(points, dtype=torch.float64).t()
    distance = (position[:, None] - position[None, :]).abs()
    # [heads] -> [heads, 1, 1]
    weight = torch.exp(-decay.double()[:, None, None] * distance)
    return weight.masked_fill(document[:, None] != document[None, :], 0.0).tril()


@triton.jit
def _load(x, o_row, i_head, m_row, o_column):
    """Load rows `[CHUNK, columns]` of a head, 0 for those that do not exist."""
    # int64: rows x heads x width exceeds 2^31 from a few million tokens on.
    p_row = x.pointer + o_row.to(tl.int64)[:, None] * x.row_stride + i_head.to(tl.int64) * x.head_stride
    b_rows = tl.load(p_row + o_column[None, :], mask=m_row[:, None] & (o_column < x.width)[None, :], other=0.0)
    # float16 is widened: its sums without a softmax may overflow, which those of bfloat16 do not.
    return b_rows if x.pointer.dtype.element_ty == tl.bfloat16 else b_rows.to(tl.float32)


@triton.jit
def _decay(rate, distance, mask):
    """Return exp(-s |distance|) where unmasked, else 0; rate: s log2(e)."""
    return tl.where(mask, tl.math.exp2(-rate * tl.abs(distance).to(tl.float32)), 0.0)


@triton.jit
def _chunk_rows(rows, o_step, end, tokens, REVERSE: tl.constexpr):
    """Return (rows, which of them exist, their positions, their documents) of steps of the recurrence."""
    m_row = o_step < end
    o_row = tokens - 1 - o_step if REVERSE else o_step
    b_position = tl.load(rows[0] + o_row, mask=m_row, other=0)
    return o_row, m_row, b_position, tl.load(rows[1] + o_row, mask=m_row, other=-2)


@triton.jit
def span_updates(
    a, b, states, rows, points, rates, num_points, tokens, span_rows, HEADS: tl.constexpr, A_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what the rows of a span add to the state at its last row, into `states` `[heads, points, A, B]`.

    rows, points: (position, document) of the rows, int32 `[T]`, and of the points, int32 `[points]`.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1)
    i_shared_head = i_head * A_HEADS // HEADS
    o_a, o_b = tl.arange(0, a.padded), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.load(rates + i_head)
    last_position, last_document = tl.load(points[0] + i_span + 1), tl.load(points[1] + i_span + 1)
    start = i_span * span_rows
    end = tl.minimum(start + span_rows, tokens)
    # The sum stays in registers; rows need no state, so no chunk waits for another.
    b_update = tl.zeros((a.padded, COLUMNS), tl.float32)
    for i_chunk in range(start, end, CHUNK):
        o_step = i_chunk + tl.arange(0, CHUNK)
        o_row, m_row, b_position, b_document = _chunk_rows(rows, o_step, end, tokens, REVERSE)
        # [CHUNK, padded A], [CHUNK, COLUMNS]
        b_a = _load(a, o_row, i_shared_head, m_row, o_a)
        b_b = _load(b, o_row, i_shared_head, m_row, o_b)
        b_write = _decay(rate, last_position - b_position, b_document == last_document)
        b_weighted = (b_b.to(tl.float32) * b_write[:, None]).to(b_b.dtype)
        b_update = tl.dot(tl.trans(b_a), b_weighted, b_update, input_precision=PRECISION)
    p_state = states + (i_head.to(tl.int64) * num_points + i_span + 1) * a.width * b.width
    mask = (o_a < a.width)[:, None] & (o_b < b.width)[None, :]
    tl.store(p_state + o_a[:, None] * b.width + o_b[None, :], b_update, mask=mask)


@triton.jit
def span_outputs(
    x, a, b, out, states, rows, points, rates, num_points, tokens, span_rows, member, HEADS: tl.constexpr,
    A_HEADS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SHARED: tl.constexpr, ADD: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write, or add to, out of a span for the query head `member` of those that share a head of x."""
    i_span, i_x_head = tl.program_id(0), tl.program_id(1)
    i_head = i_x_head * SHARED + member
    i_shared_head = i_head * A_HEADS // HEADS
    o_a, o_b = tl.arange(0, a.padded), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.load(rates + i_head)
    last_position, last_document = tl.load(points[0] + i_span), tl.load(points[1] + i_span)
    p_state = states + (i_head.to(tl.int64) * num_points + i_span) * a.width * b.width
    m_state = (o_a < a.width)[:, None] & (o_b < b.width)[None, :]
    # [padded A, COLUMNS], in registers for all chunks of the span.
    b_state = tl.load(p_state + o_a[:, None] * b.width + o_b[None, :], mask=m_state, other=0.0)
    start = i_span * span_rows
    end = tl.minimum(start + span_rows, tokens)
    for i_chunk in range(start, end, CHUNK):
        o_step = i_chunk + tl.arange(0, CHUNK)
        o_row, m_row, b_position, b_document = _chunk_rows(rows, o_step, end, tokens, REVERSE)
        # [CHUNK, padded A], [CHUNK, padded A], [CHUNK, COLUMNS]
        b_x = _load(x, o_row, i_x_head, m_row, o_a)
        b_a = _load(a, o_row, i_shared_head, m_row, o_a)
        b_b = _load(b, o_row, i_shared_head, m_row, o_b)
        # From the rows before the chunk, by the state.
        b_out = tl.dot(b_x, b_state.to(b_x.dtype), input_precision=PRECISION)
        b_out *= _decay(rate, b_position - last_position, b_document == last_document)[:, None]
        # From the rows of the chunk, by [CHUNK, CHUNK] scores.
        mask = (b_document[:, None] == b_document[None, :]) & (o_step[:, None] >= o_step[None, :])
        b_scores = tl.dot(b_x, tl.trans(b_a), input_precision=PRECISION)
        b_scores *= _decay(rate, b_position[:, None] - b_position[None, :], mask)
        b_out = tl.dot(b_scores.to(b_b.dtype), b_b, b_out, input_precision=PRECISION)
        p_out = out.pointer + o_row.to(tl.int64)[:, None] * out.row_stride + i_x_head.to(tl.int64) * out.head_stride
        m_out = m_row[:, None] & (o_b < b.width)[None, :]
        if ADD:
            b_out += tl.load(p_out + o_b[None, :], mask=m_out, other=0.0)
        tl.store(p_out + o_b[None, :], b_out, mask=m_out)
        # The state moves to the last row of the chunk: decayed by the distance, then with the chunk's own sum.
        o_last = tl.minimum(i_chunk + CHUNK, end) - 1
        o_last = tokens - 1 - o_last if REVERSE else o_last
        next_position, next_document = tl.load(rows[0] + o_last), tl.load(rows[1] + o_last)
        b_state *= _decay(rate, next_position - last_position, next_document == last_document)
        b_write = _decay(rate, next_position - b_position, b_document == next_document)
        b_weighted = (b_b.to(tl.float32) * b_write[:, None]).to(b_b.dtype)
        b_state = tl.dot(tl.trans(b_a), b_weighted, b_state, input_precision=PRECISION)
        last_position, last_document = next_position, next_document

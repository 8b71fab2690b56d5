"""The chunked recurrence of `kernels/linear_attention/recurrence.py` on CPUs: matrix products over chunks of rows, one
head and block of chunks at a time.

Within a chunk rows meet as in attention, by a matrix of weights; across chunks they meet through states
(Lightning Attention-2, arXiv 2401.04658, section 3.2). Only the state goes on from block to block, so memory does not
grow with the rows. Weights are exponentials of distances, never quotients of exponentials: a fast decay gives 0, not
infinity times 0.

Legend: C chunks of a block, L rows of a chunk, A and B widths of a and b.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import RecurrenceInputs, Segment, SequencePosition, State
from farspan.kernels.merge import accumulation_dtype

CHUNK = 64
"""Rows that meet directly: half of their products are masked, so shorter is less waste but smaller products."""
BLOCK = 2048
"""Rows that are processed at the same time."""


def chunked_recurrence(inputs: RecurrenceInputs, *, reverse: bool) -> tuple[Tensor, State]:
    """See `farspan.kernels.linear_attention.recurrence.ChunkedRecurrentBackend`."""
    x, a, b, segment, decay = inputs.q, inputs.k, inputs.v, inputs.segment, inputs.decay
    heads, dtype = len(decay), accumulation_dtype(x.dtype)
    out = torch.empty(x.shape[0], x.shape[1], b.shape[2], dtype=x.dtype if x.shape[1] == heads else dtype)
    out[segment.tokens :] = 0
    values, last = list(inputs.state.value), inputs.state.last
    for rows, chunk in _blocks(segment.tokens, reverse):
        weights = _Weights.of(segment, rows, chunk, decay.to(dtype), last, reverse)
        for head in range(heads):
            # [T, heads of t, width] -> [C * L, width] of one head -> [C, L, width]
            of_x, of_a, of_b = (
                t[rows, head * t.shape[1] // heads].to(dtype).unflatten(0, (-1, chunk)) for t in (x, a, b)
            )
            found, values[head] = _block(of_x, of_a, of_b, weights, head, values[head])
            # Where query heads share a head of out, the first of them writes it and the others add.
            total = out[rows, head * x.shape[1] // heads]
            total.add_(found) if head * x.shape[1] % heads else total.copy_(found)
        last = weights.last
    return out, State(torch.stack(values), last)


def _blocks(tokens: int, reverse: bool) -> Iterator[tuple[slice, int]]:
    """Yield blocks of rows in the order of the recurrence, and the length of their chunks; the last may be short."""
    in_chunks = tokens - tokens % CHUNK
    found = [(slice(start, min(start + BLOCK, in_chunks)), CHUNK) for start in range(0, in_chunks, BLOCK)]
    if in_chunks < tokens:
        found.append((slice(in_chunks, tokens), tokens - in_chunks))
    yield from reversed(found) if reverse else found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Weights:
    """Weights exp(-s distance) within a block, for each head.

    inside: of rows for rows of their chunk, `[heads, C, L, L]`, or for 1 chunk if all are equal. write: of rows for the
    state after their chunk, `[heads, C, L, 1]`. read: of the state before a chunk for its rows, likewise. keep: of the
    state before a chunk for the state after it, by head and chunk. last: the position of the last state.
    """

    inside: Tensor
    write: Tensor
    read: Tensor
    keep: list[list[float]]
    last: SequencePosition
    reverse: bool

    @staticmethod
    def of(
        segment: Segment, rows: slice, chunk: int, rate: Tensor, before: SequencePosition, reverse: bool
    ) -> "_Weights":
        # (position, document) of the rows, [2, T] -> [2, C, L], and of the states around all chunks, [2, C + 1].
        of_rows = torch.stack((segment.rows.position[rows], segment.rows.document[rows])).view(2, -1, chunk)
        start = of_rows.new_tensor([[before.position], [before.document]])
        # The state after a chunk is at its last row in the order of the recurrence.
        end = 0 if reverse else -1
        ends = of_rows[:, :, end]
        points = torch.cat((ends, start) if reverse else (start, ends), dim=1)
        of_before, of_after = points[:, :-1], points[:, 1:]
        if reverse:
            of_before, of_after = of_after, of_before
        inside = _inside(rate, of_rows)
        end_position, end_document = points[:, end].tolist()
        return _Weights(
            inside=inside.triu_() if reverse else inside.tril_(),
            write=_weight(rate, of_rows, of_after[:, :, None]).unsqueeze(-1),
            read=_weight(rate, of_rows, of_before[:, :, None]).unsqueeze(-1),
            keep=_weight(rate, of_after, of_before).tolist(),
            last=SequencePosition(end_document, end_position),
            reverse=reverse,
        )


def _block(x: Tensor, a: Tensor, b: Tensor, weights: _Weights, head: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out `[C * L, B]`, the state after) of x, a, b `[C, L, A or B]` and the state before `[A, B]`."""
    # [C, A, B]: what each chunk adds to the state.
    updates = torch.bmm((a * weights.write[head]).mT, b)
    before = torch.empty_like(updates)
    steps = list(zip(before.unbind(), updates.unbind(), weights.keep[head], strict=True))
    for of_chunk, update, keep in reversed(steps) if weights.reverse else steps:
        of_chunk.copy_(state)
        state = update.add_(state, alpha=keep)
    # [C, L, L]
    scores = torch.bmm(x, a.mT).mul_(weights.inside[head])
    # [C, L, B] -> [C * L, B]
    out = torch.bmm(scores, b).baddbmm_(x * weights.read[head], before)
    return out.flatten(0, 1), state.clone()


def _inside(rate: Tensor, rows: Tensor) -> Tensor:
    """Return the weights of rows `[2, C, L]` for rows of their chunk, `[heads, C or 1, L, L]`."""
    steps = rows - rows[:, :, :1]
    # Without gaps and ends of documents the weights of all chunks are those of the first.
    if torch.equal(steps, steps[:, :1].expand_as(steps)):
        rows = rows[:, :1]
    return _weight(rate, rows[:, :, :, None], rows[:, :, None, :])


def _weight(rate: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Return exp(-rate |distance|) within a document, else 0, `[heads, ...]`; `to`, `of`: (position, document)."""
    distance = (to[0] - of[0]).abs().to(rate.dtype)
    # [heads] -> [heads, 1, ...]
    exponent = rate.view(-1, *(1,) * distance.dim()) * -distance
    return exponent.exp_().masked_fill_(to[1] != of[1], 0.0)

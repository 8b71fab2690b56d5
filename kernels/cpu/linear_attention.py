"""The sweep of `kernels/linear_attention/recurrence.py` on CPUs: matrix products over chunks of rows, one head and
block of chunks at a time.

Within a chunk rows meet as in attention, by a matrix of weights; across chunks they meet through states
(Lightning Attention-2, arXiv 2401.04658, section 3.2). The state after a block is all that goes on to the next, so
memory does not grow with the rows. Weights are exponentials of distances, never quotients of exponentials: a fast
decay gives 0, not infinity times 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.linear_attention.segment import Segment, SequencePosition
from farspan.kernels.linear_attention.state import State
from farspan.kernels.merge import accumulation_dtype

CHUNK = 64
"""Rows that meet directly: half of their products are masked, so shorter is less waste but smaller products."""
BLOCK = 2048
"""Rows held at the same time."""


def sweep(
    x: Tensor, a: Tensor, b: Tensor, segment: Segment, decay: Tensor, carried: State, *, from_end: bool
) -> tuple[Tensor, State]:
    """See `farspan.kernels.linear_attention.recurrence.Sweep`."""
    heads, dtype = len(decay), accumulation_dtype(x.dtype)
    out = torch.empty(x.shape[0], x.shape[1], b.shape[2], dtype=x.dtype if x.shape[1] == heads else dtype)
    out[segment.tokens :] = 0
    values, place = list(carried.value), carried.place
    for rows, chunk in _blocks(segment.tokens, from_end):
        weights = _Weights.of(segment, rows, chunk, decay.to(dtype), place, from_end)
        for head in range(heads):
            my_x, my_a, my_b = (
                t[rows, head * t.shape[1] // heads].to(dtype).unflatten(0, (-1, chunk)) for t in (x, a, b)
            )
            found, values[head] = _block(my_x, my_a, my_b, weights, head, values[head])
            total = out[rows, head * x.shape[1] // heads]
            total.add_(found) if head * x.shape[1] % heads else total.copy_(found)
        place = weights.end
    return out, State(torch.stack(values), place)


def _blocks(tokens: int, from_end: bool) -> Iterator[tuple[slice, int]]:
    """Yield blocks of rows in the order of the sweep, and the length of their chunks; the last chunk may be short."""
    whole = tokens - tokens % CHUNK
    found = [(slice(start, min(start + BLOCK, whole)), CHUNK) for start in range(0, whole, BLOCK)]
    if whole < tokens:
        found.append((slice(whole, tokens), tokens - whole))
    yield from reversed(found) if from_end else found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Weights:
    """How rows of a block weigh, for each head.

    inside: of rows for rows of their chunk, `[heads, chunks, chunk, chunk]`, or for 1 chunk if all are alike.
    write: of rows for the state after their chunk, `[heads, chunks, chunk, 1]`. read: of the state before a chunk for
    its rows. keep: of the state before a chunk for that after it, by head and chunk. end: where the last state is.
    """

    inside: Tensor
    write: Tensor
    read: Tensor
    keep: list[list[float]]
    end: SequencePosition
    from_end: bool

    @staticmethod
    def of(
        segment: Segment, rows: slice, chunk: int, rate: Tensor, place: SequencePosition, from_end: bool
    ) -> "_Weights":
        position, document = (c[rows].view(-1, chunk) for c in (segment.rows.position, segment.rows.document))
        far = 0 if from_end else -1
        points = torch.stack(
            [
                torch.cat((ends, carried) if from_end else (carried, ends))
                for ends, carried in (
                    (position[:, far], position.new_tensor([place.position])),
                    (document[:, far], document.new_tensor([place.document])),
                )
            ]
        )
        after, before = points[:, :-1], points[:, 1:]
        if not from_end:
            after, before = before, after
        own, inside = torch.stack((position, document)), _inside(rate, position, document)
        end_position, end_document = points[:, far].tolist()
        return _Weights(
            inside=inside.triu_() if from_end else inside.tril_(),
            write=_weight(rate, own, after[:, :, None]).unsqueeze(-1),
            read=_weight(rate, own, before[:, :, None]).unsqueeze(-1),
            keep=_weight(rate, after, before).tolist(),
            end=SequencePosition(end_document, end_position),
            from_end=from_end,
        )


def _block(x: Tensor, a: Tensor, b: Tensor, weights: _Weights, head: int, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out `[rows, B]`, the state after) of x, a, b `[chunks, chunk, A or B]` and the state before `[A, B]`."""
    updates = torch.bmm((a * weights.write[head]).mT, b)
    before = torch.empty_like(updates)
    steps = list(zip(before.unbind(), updates.unbind(), weights.keep[head], strict=True))
    for state, update, keep in reversed(steps) if weights.from_end else steps:
        state.copy_(carried)
        carried = update.add_(carried, alpha=keep)
    scores = torch.bmm(x, a.mT).mul_(weights.inside[head])
    out = torch.bmm(scores, b).baddbmm_(x * weights.read[head], before)
    return out.flatten(0, 1), carried.clone()


def _inside(rate: Tensor, position: Tensor, document: Tensor) -> Tensor:
    own = torch.stack((position, document))
    steps = own - own[:, :, :1]
    if torch.equal(steps, steps[:, :1].expand_as(steps)):
        own = own[:, :1]
    return _weight(rate, own[:, :, :, None], own[:, :, None, :])


def _weight(rate: Tensor, to: Tensor, of: Tensor) -> Tensor:
    """Return exp(-rate |distance|) within a document, else 0, `[heads, ...]`; `to`, `of`: (position, document)."""
    distance = (to[0] - of[0]).abs().to(rate.dtype)
    exponent = rate.view(-1, *(1,) * distance.dim()) * -distance
    return exponent.exp_().masked_fill_(to[1] != of[1], 0.0)

"""Segment and State: the rows that a recurrence runs along, and what they leave to the rows after them."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farspan.kernels.isolation import Isolation
from farspan.kernels.masks.rows import PADDING, Rows
from farspan.kernels.merge import accumulation_dtype


class SequencePosition(NamedTuple):
    """A token of the sequence; document -1 is no token at all."""

    document: int
    position: int


NO_POSITION = SequencePosition(PADDING, 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Rows in the order of the sequence: documents one after another, each by rising position, padding at the end.

    Positions may have gaps. tokens: rows before the padding. first, last: the positions of the first and last of them.
    isolation: of the rows, each side with a last row for a state: the keys have the state before, of the first
    document, the queries the state after; None if it needs none.
    """

    rows: Rows
    tokens: int
    first: SequencePosition
    last: SequencePosition
    isolation: Isolation | None
    tables: dict[Hashable, Any] = field(default_factory=dict, init=False)
    """What backends compute from the rows, under keys of their own."""

    def __len__(self) -> int:
        return len(self.rows)

    def isolation_after(self, before: SequencePosition) -> Isolation | None:
        """Return the isolation where the state before the segment is at `before`."""
        if before.document in (PADDING, self.first.document):
            return self.isolation
        last = self.last if self.tokens else before
        return Isolation.of(_and_one(self.rows, last), _and_one(self.rows, before), causal=True)

    @staticmethod
    def of(rows: Rows) -> "Segment":
        """Return `rows` as a segment; raises ValueError if they are in another order, which `order` fixes."""
        tokens = int((rows.document >= 0).sum())
        position, document = rows.position[:tokens], rows.document[:tokens]
        starts = document.diff(prepend=document.new_full((1,), PADDING)) != 0
        if bool((document < 0).any()) or starts.sum() != document.unique().numel():
            raise ValueError("the rows of a segment must be documents one after another, then padding: sort them")
        if bool(((position.diff() <= 0) & ~starts[1:]).any()):
            raise ValueError("the rows of a document in a segment must be in the order of their positions: sort them")
        first = last = NO_POSITION
        if tokens:
            first, last = (SequencePosition(int(document[i]), int(position[i])) for i in (0, -1))
        # The state before is earlier than every row.
        before = SequencePosition(first.document, -1)
        isolation = Isolation.of(_and_one(rows, last), _and_one(rows, before), causal=True)
        return Segment(rows=rows, tokens=tokens, first=first, last=last, isolation=isolation)


def _and_one(rows: Rows, place: SequencePosition) -> Rows:
    """Return the rows and one more."""
    return Rows(
        position=torch.cat((rows.position, rows.position.new_tensor([place.position]))),
        document=torch.cat((rows.document, rows.document.new_tensor([place.document]))),
    )


def order(rows: Rows) -> Tensor:
    """Return the index, int64 `[rows]`, that sorts rows into a segment."""
    # One number that sorts as (document, position); padding comes last.
    document = rows.document.to(torch.int64).masked_fill(rows.document < 0, 2**31)
    return ((document << 31) + rows.position).argsort(stable=True)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The sum over the tokens j of the last document of exp(-s (P - position_j)) k_j v_j^T, at its last position P.

    value: `[Hq, D, Dv]` in the accumulation dtype. last: the document and P, which follow from the rows alone, so that
    only values have to be sent. Rows without a token leave value 0 at NO_POSITION, which enters no row.
    """

    value: Tensor
    last: SequencePosition


def empty_state(heads: int, head_dim: int, value_dim: int, like: Tensor) -> State:
    """Return the state before any token."""
    dtype = accumulation_dtype(like.dtype)
    return State(torch.zeros(heads, head_dim, value_dim, dtype=dtype, device=like.device), NO_POSITION)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RecurrenceInputs:
    """q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]`, the rates s of decay `[Hq]`, the state before the segment."""

    q: Tensor
    k: Tensor
    v: Tensor
    segment: Segment
    decay: Tensor
    state: State

"""Stretch: rows in the order of their sequence, which is what a recurrence runs along."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.masks.rows import PADDING, Rows


class SequencePosition(NamedTuple):
    """A token of the sequence. Of document -1 is the place where there is nothing."""

    document: int
    position: int


NOWHERE = SequencePosition(PADDING, 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Documents one after another, each by rising position, with or without gaps; padding at the end.

    tokens: rows before the padding. first, last: the places of the first and of the last of them.
    """

    rows: Rows
    tokens: int
    first: SequencePosition
    last: SequencePosition

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(rows: Rows) -> "Segment":
        """Return `rows` as a stretch; raises ValueError if they are in another order, which `order` would mend."""
        tokens = int((rows.document >= 0).sum())
        position, document = rows.position[:tokens], rows.document[:tokens]
        starts = document.diff(prepend=document.new_full((1,), PADDING)) != 0
        if bool((document < 0).any()) or starts.sum() != document.unique().numel():
            raise ValueError("the rows of a stretch must be documents one after another, then padding: sort them")
        if bool(((position.diff() <= 0) & ~starts[1:]).any()):
            raise ValueError("the rows of a document in a stretch must be in the order of their positions: sort them")
        if not tokens:
            return Segment(rows=rows, tokens=0, first=NOWHERE, last=NOWHERE)
        first, last = (SequencePosition(int(document[i]), int(position[i])) for i in (0, -1))
        return Segment(rows=rows, tokens=tokens, first=first, last=last)


def order(rows: Rows) -> Tensor:
    """Return the index, int64 `[rows]`, that puts rows into the order of a stretch."""
    document = rows.document.to(torch.int64).masked_fill(rows.document < 0, 2**31)
    return ((document << 31) + rows.position).argsort(stable=True)

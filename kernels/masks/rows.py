"""Rows: tokens of one tensor together with what visibility depends on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""Document of a row that attends to nothing and is attended by nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """What is known of each row of a tensor `[rows, ...]`; the order of rows is free.

    position: int32 `[rows]`, position inside the row's document, from 0.
    document: int32 `[rows]`, the document's id; -1 is padding.
    """

    position: Tensor
    document: Tensor

    def __post_init__(self) -> None:
        for name, column in (("position", self.position), ("document", self.document)):
            if column.dtype != torch.int32 or column.dim() != 1:
                raise ValueError(f"Rows.{name} must be int32 [rows], not {column.dtype} {list(column.shape)}")
        if self.position.shape != self.document.shape:
            raise ValueError(
                f"Rows.position has {len(self.position)} rows but Rows.document has {len(self.document)}; "
                "both describe the same rows"
            )

    def __len__(self) -> int:
        return self.position.shape[0]

    def ordinal(self) -> Tensor:
        """Return numbers that order rows by document, then by position; int64 `[rows]`, negative for padding."""
        return ordinal(self.document, self.position)

    def take(self, index: Tensor) -> "Rows":
        """Return the rows at `index` (int64 `[n]`); an index of -1 gives a padding row."""
        # -1 is the last element of a column with one more: this makes padding of it, also where there are no rows.
        return Rows(
            position=torch.cat((self.position, self.position.new_zeros(1)))[index],
            document=torch.cat((self.document, self.document.new_full((1,), PADDING)))[index],
        )

    def slice(self, where: slice) -> "Rows":
        """Return these rows, as views."""
        return Rows(position=self.position[where], document=self.document[where])

    def to(self, device: torch.device | str) -> "Rows":
        """Return the same rows with their columns on `device`."""
        return Rows(position=self.position.to(device), document=self.document.to(device))

    @staticmethod
    def packed(document_lengths: Sequence[int], padding: int = 0) -> "Rows":
        """Return documents of these lengths one after another, then `padding` padding rows."""
        lengths = torch.tensor([*document_lengths, padding], dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        document = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        position = (torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)).int()
        is_padding = document == len(document_lengths)
        return Rows(position=position.masked_fill(is_padding, 0), document=document.masked_fill(is_padding, PADDING))


def ordinal(document: Tensor, position: Tensor) -> Tensor:
    """Return int64 numbers that order by document, then by position."""
    return (document.long() << 32) + position

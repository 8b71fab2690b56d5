"""Rows: position and document of each token of a tensor, all that attention masks depend on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.ragged import expand, take_or

PADDING = -1
"""Document of a row that attends to nothing and that nothing attends to."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The token that each row of a tensor `[rows, ...]` holds; the order of rows is free.

    position: int32 `[rows]`, position inside the row's document, from 0.
    document: int32 `[rows]`, the document's id: any number from 0, in any order; rows of negative ones are padding.
    Raises ValueError for other dtypes or shapes.
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
        """int64 `[rows]` that sort by document, then by position; negative for padding."""
        return ordinal(self.document, self.position)

    def document_length(self) -> Tensor:
        """The number of rows of each row's document, int64 `[rows]`; of padding it means nothing."""
        # Ids may be any numbers, so that nothing is counted by id.
        _, document, counts = self.document.unique(return_inverse=True, return_counts=True)
        return counts[document]

    def take(self, index: Tensor) -> "Rows":
        """The rows at `index` (int64 `[n]`); an index of -1 gives a padding row."""
        return Rows(position=take_or(self.position, index, 0), document=take_or(self.document, index, PADDING))

    def slice(self, where: slice) -> "Rows":
        """The same columns as views of some rows."""
        return Rows(position=self.position[where], document=self.document[where])

    def to(self, device: torch.device) -> "Rows":
        return Rows(position=copy_to(self.position, device), document=copy_to(self.document, device))

    @staticmethod
    def packed(document_lengths: Sequence[int], padding: int = 0) -> "Rows":
        """Documents of these lengths one after another, then `padding` padding rows."""
        # Padding is one more document until its id is replaced.
        document, position = (x.int() for x in expand(torch.tensor([*document_lengths, padding], dtype=torch.int64)))
        is_padding = document == len(document_lengths)
        return Rows(position=position.masked_fill(is_padding, 0), document=document.masked_fill(is_padding, PADDING))


def ordinal(document: Tensor, position: Tensor) -> Tensor:
    """int64 that sort by document, then by position."""
    # Positions are int32, so they fill the lower half without a carry.
    return (document.long() << 32) + position

"""Gathering: the tokens that each KV head chose of a sequence, and the way there and back.

Among the chosen there is one KV head: rows are `[rows, G, width]`, with the G query heads of the one that chose them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.merge import accumulation_dtype


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenTokens:
    """The rows that KV heads took of a sequence, head by head, each document's in the order of their positions.

    token, head: where each comes from, int64 `[rows]`; a token of -1 is padding. rows: every head's part of every
    document is a document of its own, whose positions count from 0.
    """

    token: Tensor
    head: Tensor
    rows: Rows

    @staticmethod
    def of(chosen: Tensor, global_rows: Rows) -> "ChosenTokens":
        """Gather what `chosen`, bool `[tokens, Hk]`, says of a sequence."""
        documents, document = global_rows.document.unique(return_inverse=True)
        order = global_rows.ordinal().argsort()
        head, place = chosen.cpu()[order].t().nonzero(as_tuple=True)
        token = order[place]
        number = head * len(documents) + document[token]
        first = torch.searchsorted(number, number)
        rows = Rows(position=(torch.arange(len(number)) - first).int(), document=number.int())
        return ChosenTokens(token=token, head=head, rows=rows)

    def collect(self, x: Tensor, kv_heads: int) -> Tensor:
        """Return `[rows, G, width]` of x `[tokens, Hk x G, width]`; padding is 0."""
        token, head = self.token.to(x.device), self.head.to(x.device)
        collected = x.unflatten(1, (kv_heads, -1))[token.clamp(min=0), head]
        return collected.masked_fill_((token < 0).view(-1, 1, 1), 0)

    def spread(self, x: Tensor, shape: Sequence[int], *, fill: float = 0.0) -> Tensor:
        """Return `[tokens, Hk x G, width]`, `shape` its first two, of x `[rows, G, width]`; the rest is `fill`."""
        real = (self.token >= 0).to(x.device)
        spread = x.new_full((shape[0], shape[1] // x.shape[1], *x.shape[1:]), fill)
        spread[self.token.to(x.device)[real], self.head.to(x.device)[real]] = x[real]
        return spread.flatten(1, 2)


def gate(part: Tensor, logits: Tensor) -> Tensor:
    """Return part `[rows, G, Dv]` times the sigmoid of logits `[rows, 1, 1]`, in the dtype of part."""
    return (part.to(accumulation_dtype(part.dtype)) * logits.sigmoid()).to(part.dtype)


def gate_backward(dout: Tensor, part: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of part, in its dtype, and of logits."""
    dout, weight = dout.to(logits.dtype), logits.sigmoid()
    dweight = (dout * part.to(logits.dtype)).sum(dim=(1, 2), keepdim=True)
    return (dout * weight).to(part.dtype), dweight * weight * (1 - weight)

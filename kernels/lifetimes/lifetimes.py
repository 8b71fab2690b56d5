"""Lifetimes: the last query that sees each key of each KV head, by the type that the head gave the key.

A global key is seen by the rest of its document, a local one up to the next global token, that one included, and a
sliding one by a window. The first and the last token of a document are global whatever their routing: so every key has
a next global token or is one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows, ordinal
from farspan.kernels.ragged import take_or

GLOBAL, LOCAL, SLIDING = range(3)


def chosen_types(logits: Tensor) -> Tensor:
    """Return the type with the highest of the logits `[T, Hk, 3]`, the first of equals, int8 `[T, Hk]`."""
    of_global, local, sliding = logits.unbind(dim=-1)
    first_two = (local > of_global).to(torch.int8)
    return first_two.masked_fill_(sliding > torch.maximum(of_global, local), SLIDING)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentOrder:
    """The tokens of a sequence document by document, by their positions; padding first.

    index: the token at each place, int64 `[tokens]`. first, end: the places of the first and last token of the document
    at each place, int64 `[tokens]`. forced: whether the token is global whatever its routing, bool `[tokens]`: at both
    ends of a document, and padding.
    """

    index: Tensor
    first: Tensor
    end: Tensor
    forced: Tensor

    @staticmethod
    def of(global_rows: Rows) -> "DocumentOrder":
        """Order the rows of a full sequence, which come in any order."""
        index = global_rows.ordinal().argsort()
        # For each place: the first place of its document, and the one after its last.
        sizes = global_rows.document.unique(return_counts=True)[1]
        stop = sizes.cumsum(0).repeat_interleave(sizes)
        first, place = stop - sizes.repeat_interleave(sizes), torch.arange(len(index))
        forced = (place == first) | (place == stop - 1) | (global_rows.document[index] < 0)
        return DocumentOrder(index=index, first=first, end=stop - 1, forced=forced)

    def restore(self, x: Tensor) -> Tensor:
        """Return x `[..., tokens]`, of tokens in this order, in the order of the sequence."""
        return torch.empty_like(x).index_copy_(-1, self.index.to(x.device), x)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lifetimes:
    """The lifetimes of some tokens of a sequence, on the CPU.

    types: int8 `[Hk, tokens]`; forced tokens are global. last: the last position that sees the key, int32
    `[Hk, tokens]`; -1 for padding, which no query sees. following: the position of the next global token after the
    token, and beyond: of the one after that, int32 `[Hk, tokens]`; where there is none, the last token's. window:
    positions after its own that see a sliding key.
    """

    types: Tensor
    last: Tensor
    following: Tensor
    beyond: Tensor
    window: int

    @staticmethod
    def of(types: Tensor, global_rows: Rows, window: int) -> "Lifetimes":
        """Return the lifetimes of a full sequence by types, int8 `[tokens, Hk]`."""
        order = DocumentOrder.of(global_rows)
        kind = types.cpu().t()[:, order.index].masked_fill(order.forced, GLOBAL)
        position = global_rows.position[order.index].masked_fill(global_rows.document[order.index] < 0, -1)
        # n(j) and n(n(j)) of the gradient.
        after = _next_global(kind, order)
        following, beyond = position[after], position[after.gather(1, after)]
        end = position[order.end]
        sliding = torch.minimum(position.long() + window, end).int()
        last = torch.where(kind == GLOBAL, end, torch.where(kind == LOCAL, following, sliding))
        # Back to the order of the sequence.
        kind, last, following, beyond = (order.restore(x) for x in (kind, last, following, beyond))
        return Lifetimes(types=kind, last=last, following=following, beyond=beyond, window=window)

    def take(self, index: Tensor) -> "Lifetimes":
        """Return those of the tokens at `index` (int64 `[n]`); an index of -1 gives padding."""
        last, following, beyond = (take_or(x, index, -1) for x in (self.last, self.following, self.beyond))
        types = take_or(self.types, index, GLOBAL)
        return Lifetimes(types=types, last=last, following=following, beyond=beyond, window=self.window)

    def pairs(self, rows: Rows) -> int:
        """Return how many pairs of `rows`, which these lifetimes are of, see each other: the mean over KV heads."""
        # A key is seen by a run of its document's queries, from its own position to its last; padding comes first.
        seen_by = rows.ordinal().sort().values[int((rows.document < 0).sum()) :]
        first = torch.searchsorted(seen_by, rows.ordinal())
        stop = torch.searchsorted(seen_by, ordinal(rows.document, self.last), right=True)
        return int((stop - first).clamp(min=0).sum()) // len(self.last)


def _next_global(kind: Tensor, order: DocumentOrder) -> Tensor:
    """Return the place of the next global token after each, int64 `[Hk, tokens]`; the last one's in its document."""
    tokens = kind.shape[1]
    if not tokens:
        return kind.long()
    place = torch.arange(tokens)
    # A running minimum from the right, then one place to the left: at or after becomes after.
    at_or_after = torch.where(kind == GLOBAL, place, tokens).flip(1).cummin(dim=1).values.flip(1)
    return torch.where(place == order.end, place, at_or_after.roll(-1, dims=1))

"""Lifetimes: the last query that sees each key of each KV head, by the type that the head gave the key.

A global key is seen by the rest of its document, a local one up to the next global token, that one included, and a
sliding one by a window. The first and the last token of a document are global whatever their routing: so every key has
a next global token or is one.
"""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.attention_mask import MAX_WINDOW
from farspan.kernels.masks.rows import Rows, ordinal

GLOBAL, LOCAL, SLIDING = range(3)


def chosen_types(logits: Tensor) -> Tensor:
    """Return the type with the highest of the logits `[T, Hk, 3]`, the first of equals, int8 `[T, Hk]`."""
    of_global, local, sliding = logits.unbind(dim=-1)
    first_two = (local > of_global).to(torch.int8)
    return first_two.masked_fill_(sliding > torch.maximum(of_global, local), SLIDING)


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentOrder:
    """The tokens of a sequence document by document, by their positions; padding first.

    index: the token at each place, int64 `[tokens]`. place: the place of each token, its inverse. first, end: the
    places of the first and last token of the document at each place, int64 `[tokens]`. position: at each place, int32
    `[tokens]`; -1 for padding. forced: whether the token is global whatever its routing, bool `[tokens]`: at both ends
    of a document, and padding.
    """

    index: Tensor
    place: Tensor
    first: Tensor
    end: Tensor
    position: Tensor
    forced: Tensor
    _elsewhere: dict[torch.device, "DocumentOrder"] = field(default_factory=dict, init=False)

    @staticmethod
    def of(global_rows: Rows) -> "DocumentOrder":
        """Order the rows of a full sequence, which come in any order."""
        index = global_rows.ordinal().argsort()
        # For each place: the first place of its document, and the one after its last.
        sizes = global_rows.document.unique(return_counts=True)[1]
        stop = sizes.cumsum(0).repeat_interleave(sizes)
        first, number = stop - sizes.repeat_interleave(sizes), torch.arange(len(index))
        padding = global_rows.document[index] < 0
        return DocumentOrder(
            index=index,
            place=torch.empty_like(index).index_copy_(0, index, number),
            first=first,
            end=stop - 1,
            position=global_rows.position[index].masked_fill(padding, -1),
            forced=(number == first) | (number == stop - 1) | padding,
        )

    def to(self, device: torch.device) -> "DocumentOrder":
        """Return the same on `device`, where it is copied once."""
        if device == self.index.device:
            return self
        columns = [f.name for f in fields(self) if f.init]

        def make() -> DocumentOrder:
            there = DocumentOrder(**{name: copy_to(getattr(self, name), device) for name in columns})
            # Copied too, where the device would find them by operations.
            vars(there)["of_tokens"] = tuple(copy_to(x, device) for x in self.of_tokens)
            vars(there)["from_end"] = _FromEnd(*(copy_to(x, device) for x in self.from_end))
            return there

        return once(self._elsewhere, device, make)

    def restore(self, x: Tensor) -> Tensor:
        """Return x `[..., tokens]`, of tokens in this order, in the order of the sequence."""
        return x[..., self.place]

    @cached_property
    def of_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Position, length of the document and whether it is forced of each token, in the order of the sequence."""
        return self.restore(self.position), self.restore(self.end - self.first + 1), self.restore(self.forced)

    @cached_property
    def from_end(self) -> "_FromEnd":
        left = self.position[self.end] - self.position
        columns = self.index, self.forced, self.position, left, left == 0
        number = torch.arange(len(self.index), device=self.index.device)
        return _FromEnd(number, len(number) - 1 - self.place, *(x.flip(0) for x in columns))


class _FromEnd(NamedTuple):
    """Columns of the tokens in the opposite order, so that the next global token of each is the last one before it.

    number: 0, 1, ... place: of each token. Of each place: its token; forced; position; left, the tokens after it in its
    document; is_last, whether there are none.
    """

    number: Tensor
    place: Tensor
    token: Tensor
    forced: Tensor
    position: Tensor
    left: Tensor
    is_last: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lifetimes:
    """The lifetimes of some tokens of a sequence, on the device of their types.

    columns: int32 `[4, Hk, tokens]`, named below; -1 for padding, which no query sees. window: positions after its own
    that see a sliding key.
    """

    columns: Tensor
    window: int

    @staticmethod
    def of(types: Tensor, order: DocumentOrder, window: int) -> "Lifetimes":
        """Return the lifetimes of a full sequence by types, int8 `[tokens, Hk]`; does not wait for their device."""
        # Everything below is in the opposite of document order, [Hk, tokens].
        rows = order.to(types.device).from_end
        kind = types.t()[:, rows.token].masked_fill(rows.forced, GLOBAL)
        is_global = kind == GLOBAL
        # n(j) and n(n(j)) of the gradient.
        after = _next_global(is_global, rows)
        following, beyond = rows.position[after], rows.position[after.gather(1, after)]
        end = rows.position + rows.left
        # position + window may exceed int32, what is left of the document does not.
        sliding = rows.position + rows.left.clamp(max=min(window, MAX_WINDOW))
        last = torch.where(is_global, end, torch.where(kind == LOCAL, following, sliding))
        # Back to the order of the sequence.
        return Lifetimes(columns=torch.stack((kind.int(), last, following, beyond))[..., rows.place], window=window)

    @property
    def types(self) -> Tensor:
        """`[Hk, tokens]`; forced tokens are global, as is padding of a full sequence."""
        return self.columns[0]

    @property
    def last(self) -> Tensor:
        """The last position that sees the key, `[Hk, tokens]`."""
        return self.columns[1]

    @property
    def following(self) -> Tensor:
        """The position of the next global token after the token, `[Hk, tokens]`; the last token's if there is none."""
        return self.columns[2]

    @property
    def beyond(self) -> Tensor:
        """That of the global token after the following one, `[Hk, tokens]`; the last token's if there is none."""
        return self.columns[3]

    def pairs(self, rows: Rows) -> int:
        """Return how many pairs of `rows`, which these lifetimes are of, see each other: the mean over KV heads."""
        # A key is seen by a run of its document's queries, from its own position to its last; padding comes first.
        seen_by = rows.ordinal().sort().values[int((rows.document < 0).sum()) :]
        first = torch.searchsorted(seen_by, rows.ordinal())
        stop = torch.searchsorted(seen_by, ordinal(rows.document, self.last), right=True)
        return int((stop - first).clamp(min=0).sum()) // len(self.last)


def _next_global(is_global: Tensor, rows: _FromEnd) -> Tensor:
    """Return the place of the next global token after each, int64 `[Hk, tokens]`; the last one's in its document."""
    if not len(rows.number):
        return is_global.long()
    # The first place is global. A running maximum, then one place on: at or before becomes before.
    before = (is_global * rows.number).cummax(dim=1).values.roll(1, dims=1)
    return torch.where(rows.is_last, rows.number, before)

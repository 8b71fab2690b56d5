"""The attention mask as columns of numbers of queries and keys, so that a kernel compares a few of them at once.

Keys are ranked by document and position. The keys that a query attends to are then one interval of ranks: those of its
document, not later than the query, inside the window. Sinks are a second interval. A neighborhood is none: coordinates
of its grid are packed into one number, so that all dimensions are compared at once.

Example: a grid of 4 x 8 takes fields of 2 and 3 bits, each below a guard bit G: `G yy G xxx`. The query at (2, 5) with
a window of 3 in both directions has low (1, 4) and high (3, 6), and the key at (2, 7):

    key with guards set - low     1 10 1 111 - 0 01 0 100 = 1 01 1 011    both guards survive: not below low
    high with guards set - key    1 11 1 110 - 0 10 0 111 = 1 01 0 111    the guard of x is gone: 7 > 6, masked
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.attention_mask import MAX_WINDOW, AttentionMask
from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import PADDING, Rows, ordinal
from farspan.kernels.planning.plan import Plan

BITS = 31
"""Bits of a packed number: int32 without its sign."""


class MaskTerms(NamedTuple):
    """The attention mask as columns of rows (T queries, S keys); int32.

    q_document `[T]`: -1 is padding. k_rank `[S]`: keys by document and position, and for each query the first and last
    rank that it attends to, one row for each distinct window, `[windows, T]`, with the window of each head `[Hq]`, and
    again for sinks, `[T]`. lifetime `[Hk, S]`: compared with q_position `[T]`; k_position is `[S]`. The others: see
    `pack`.
    """

    q_document: Tensor
    k_rank: Tensor
    window: Tensor
    q_first: Tensor
    q_last: Tensor
    q_first_sink: Tensor | None
    q_last_sink: Tensor | None
    q_position: Tensor
    k_position: Tensor
    lifetime: Tensor | None
    q_low: Tensor | None
    q_high: Tensor | None
    k_coordinates: Tensor | None
    guards: int | None
    q_class: Tensor | None
    k_class: Tensor | None


OF_QUERIES = (
    "q_document", "q_first", "q_last", "q_first_sink", "q_last_sink", "q_position", "q_low", "q_high", "q_class"
)  # fmt: skip


def of_queries(terms: MaskTerms, index: Tensor) -> MaskTerms:
    """Return the terms of the queries at `index`, int64 `[queries]`, on its device."""
    columns = {name: getattr(terms, name) for name in OF_QUERIES}
    return terms._replace(**{name: x[..., index] for name, x in columns.items() if x is not None})


def mask_terms(plan: Plan, device: torch.device) -> MaskTerms:
    """Return the mask of a plan without its lifetimes; rows that are in no block of its selection count as padding."""
    attention_mask, queries, keys = plan.attention_mask, plan.queries, plan.keys
    if plan.selection is not None:
        queries = _without(queries, plan.selection.query_block < 0)
        keys = _without(keys, plan.selection.blocks.of(keys) < 0)
    ranks = KeyRanks.of(keys)
    # [2, windows, T]
    near = torch.stack([ranks.near(queries, part.attention_mask) for part in plan.parts], dim=1)
    window = torch.zeros(plan.heads, dtype=torch.int32)
    for number, part in enumerate(plan.parts):
        window[list(part.heads)] = number
    columns: dict[str, Any] = {
        "q_document": queries.document, "k_rank": ranks.rank, "window": window, "q_first": near[0], "q_last": near[1],
        "q_position": queries.position, "k_position": keys.position,
    }  # fmt: skip
    if attention_mask.sinks:
        columns["q_first_sink"], columns["q_last_sink"] = ranks.sinks(queries, attention_mask)
    if attention_mask.neighborhood is not None:
        columns |= pack(attention_mask.neighborhood, queries, keys)
    found = {
        name: column if isinstance(column, int) else copy_to(column.int().contiguous(), device)
        for name, column in columns.items()
    }
    return MaskTerms(**{name: found.get(name) for name in MaskTerms._fields})  # pyright: ignore[reportArgumentType]


def _without(rows: Rows, absent: Tensor) -> Rows:
    return Rows(position=rows.position, document=rows.document.masked_fill(absent, PADDING))


@dataclass(frozen=True, slots=True, eq=False)
class KeyRanks:
    """Keys by document and position: `rank` int32 `[keys]`, -1 for padding; `ordered`, their ordinals, ascending."""

    rank: Tensor
    ordered: Tensor

    @staticmethod
    def of(keys: Rows) -> "KeyRanks":
        """Rank the keys that are not padding."""
        # Ordinals of padding are negative, and come first.
        ordered, order = keys.ordinal().sort(stable=True)
        padding = int((keys.document < 0).sum())
        rank = torch.empty(len(keys), dtype=torch.int32)
        rank[order] = (torch.arange(len(keys), dtype=torch.int32) - padding).clamp(min=-1)
        return KeyRanks(rank, ordered[padding:])

    def near(self, queries: Rows, attention_mask: AttentionMask) -> Tensor:
        """Return the first and last rank of each query's window, without sinks, int32 `[2, queries]`; -1 last if none.

        `attention_mask` has one window at most.
        """
        assert not isinstance(attention_mask.window, tuple)
        reach = MAX_WINDOW if attention_mask.window is None else attention_mask.window - 1
        position = queries.position.long()
        low, high = (position - reach).clamp(min=0), (position + reach).clamp(max=MAX_WINDOW)
        return self._between(queries, low, high, attention_mask.causal)

    def sinks(self, queries: Rows, attention_mask: AttentionMask) -> Tensor:
        """Return the same of the first `attention_mask.sinks` positions."""
        low = torch.zeros(len(queries), dtype=torch.int64)
        return self._between(queries, low, low + attention_mask.sinks - 1, attention_mask.causal)

    def _between(self, queries: Rows, low: Tensor, high: Tensor, causal: bool) -> Tensor:
        high = torch.minimum(high, queries.position.long()) if causal else high
        first = torch.searchsorted(self.ordered, ordinal(queries.document, low))
        last = torch.searchsorted(self.ordered, ordinal(queries.document, high), right=True) - 1
        return torch.stack((first, last.masked_fill(queries.document < 0, -1))).int()


def pack(neighborhood: Neighborhood, queries: Rows, keys: Rows) -> dict[str, Tensor | int]:
    """Return a neighborhood as packed int32 columns: a key is in it if no field of key - low or high - key borrows.

    q_low, q_high `[queries]`, k_coordinates `[keys]`: each coordinate below a guard bit that is set in q_high only.
    guards: all guard bits. q_class, k_class, if there are several grids or dilation: the grid and the residue of
    dilation, equal where a query may attend to a key. Raises ValueError for a grid that takes more than 31 bits.
    """
    dimensions = neighborhood.dimensions
    widths = [(dimension.length - 1).bit_length() for dimension in dimensions]
    if sum(widths) + len(widths) > BITS:
        raise ValueError(
            f"a grid of {[dimension.length for dimension in dimensions]} takes {sum(widths) + len(widths)} bits, "
            f"more than {BITS}: attention.backend='reference' has no such limit"
        )
    (q_class, *lows), (_, *highs) = neighborhood.intervals(queries.position)
    k_class, *coordinates = neighborhood.coordinates(keys.position)
    columns = {"q_low": lows, "q_high": highs, "k_coordinates": coordinates}
    packed = {name: torch.zeros_like(x[0]) for name, x in columns.items()}
    guards = 0
    several = bool((q_class > 0).any() or (k_class > 0).any())
    for n, (dimension, width) in enumerate(zip(dimensions, widths, strict=True)):
        for name, x in columns.items():
            packed[name] = packed[name] << (width + 1) | x[n]
        guards = guards << (width + 1) | 1 << width
        # Keys of a window are `dilation` apart, so they have the same residue.
        q_class = q_class * dimension.dilation + lows[n] % dimension.dilation
        k_class = k_class * dimension.dilation + coordinates[n] % dimension.dilation
        several |= dimension.dilation > 1
    packed["q_high"] |= guards
    return {**packed, "guards": guards, **({"q_class": q_class, "k_class": k_class} if several else {})}

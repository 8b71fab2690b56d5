"""Attention masks as data: evaluated here only where quadratic cost is fine, counted in closed form."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import Rows

MAX_WINDOW = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMask:
    """A query attends to a key iff all terms hold: same document, not padding, and those below.

    causal: key position <= query position.
    window: |query position - key position| < window, so 1 is the token itself; a tuple has one window per query head.
    sinks: the first `sinks` keys of the document are visible from outside the window too (StreamingLLM, 2309.17453).
    neighborhood: the key lies in the query's neighborhood on the grid.
    Raises ValueError for windows outside 1 to 2^31 - 1, negative sinks, and sinks without a window.
    """

    causal: bool = True
    window: int | tuple[int, ...] | None = None
    sinks: int = 0
    neighborhood: Neighborhood | None = None

    def __post_init__(self) -> None:
        for window in self.window if isinstance(self.window, tuple) else (self.window,):
            if window is not None and window < 1:
                raise ValueError(f"window={window} must be at least 1: a query always sees its own position")
            if window is not None and window > MAX_WINDOW:
                raise ValueError(
                    f"window={window} must be at most {MAX_WINDOW}, as positions are int32; None is no window"
                )
        if self.window == ():
            raise ValueError("window=() has no head: give one window per query head")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")
        if self.sinks and self.window is None:
            raise ValueError(f"sinks={self.sinks} mean nothing without a window: every key is seen anyway")

    @property
    def is_uniform(self) -> bool:
        """Whether all heads have the same mask."""
        return not isinstance(self.window, tuple)

    @property
    def is_plain(self) -> bool:
        """Whether a query sees its full document, or all of it up to itself."""
        return self.window is None and self.neighborhood is None

    def of_heads(self, heads: slice) -> "AttentionMask":
        """The mask of a slice of the query heads."""
        return replace(self, window=self.window[heads]) if isinstance(self.window, tuple) else self

    def by_heads(self, num_heads: int) -> dict["AttentionMask", list[int]]:
        """Uniform masks and the query heads of each; raises ValueError unless there is a window for each head."""
        if not isinstance(self.window, tuple):
            return {self: list(range(num_heads))}
        if len(self.window) != num_heads:
            raise ValueError(
                f"{len(self.window)} windows for {num_heads} query heads: give one per head, or one for all"
            )
        groups: dict[AttentionMask, list[int]] = {}
        for head, window in enumerate(self.window):
            groups.setdefault(replace(self, window=window), []).append(head)
        return groups

    def mask(self, queries: Rows, keys: Rows) -> Tensor:
        """The dense mask, bool `[queries, keys]`; quadratic, for references and irregular tiles."""
        # [queries, 1] against [1, keys]
        return self.mask_mod(
            queries.position[:, None], queries.document[:, None], keys.position[None, :], keys.document[None, :]
        )

    def mask_mod(self, position: Tensor, document: Tensor, key_position: Tensor, key_document: Tensor) -> Tensor:
        """Whether queries attend to keys, bool of the four tensors' broadcast shape (FlexAttention's `mask_mod`)."""
        assert not isinstance(self.window, tuple), "every head has a mask of its own: see by_heads"
        # No in-place operations: torch.compile inlines this into FlexAttention's kernel.
        visible = (document == key_document) & (document >= 0)
        distance = position - key_position
        if self.causal:
            visible = visible & (distance >= 0)
        if self.window is not None:
            near = distance.abs() < self.window
            visible = visible & (near | (key_position < self.sinks) if self.sinks else near)
        if self.neighborhood is not None:
            visible = visible & self.neighborhood.mask_mod(position, key_position)
        return visible


def count_keys_per_query(attention_mask: AttentionMask, global_rows: Rows) -> Tensor:
    """Keys that each row of a full sequence attends to, the mean over heads, float64 `[tokens]`; 0 for padding.

    Closed form, linear in the rows, which must hold all positions of their documents.
    """
    if isinstance(attention_mask.window, tuple):
        uniform = attention_mask.by_heads(len(attention_mask.window))
        weighted = [count_keys_per_query(one, global_rows) * len(heads) for one, heads in uniform.items()]
        return torch.stack(weighted).sum(dim=0) / len(attention_mask.window)
    real = global_rows.document >= 0
    if attention_mask.neighborhood is not None:
        cell = global_rows.position.long() % attention_mask.neighborhood.tokens
        return _keys_per_cell(attention_mask.neighborhood)[cell].masked_fill_(~real, 0)
    position = global_rows.position.double()
    # Rows come in any order: a document's last position is its row count - 1.
    last = global_rows.document_length().double() - 1
    # Visible keys are positions low..high, and the sinks outside of them.
    high = position if attention_mask.causal else last
    count = high + 1
    if attention_mask.window is not None:
        low = (position - attention_mask.window + 1).clamp(min=0)
        high = torch.minimum(high, position + attention_mask.window - 1)
        count = high - low + 1 + low.clamp(max=attention_mask.sinks)
        if not attention_mask.causal:
            count += (last.clamp(max=attention_mask.sinks - 1) - high).clamp(min=0)  # sinks after the window
    return count.masked_fill_(~real, 0)


def _keys_per_cell(neighborhood: Neighborhood) -> Tensor:
    """Keys that each cell of a full grid attends to, float64 `[cells]`: the product over dimensions."""
    table = torch.ones(1, dtype=torch.float64)
    for dimension in neighborhood.dimensions:
        low, high = dimension.interval(torch.arange(dimension.length))
        keys = ((high - low) // dimension.dilation + 1).clamp(min=0).double()  # of each coordinate, [length]
        table = (table[:, None] * keys).flatten()  # [cells so far, length] -> [cells]
    return table

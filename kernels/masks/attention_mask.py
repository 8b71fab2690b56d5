"""Visibility: which rows see which, as data; evaluated here only where quadratic cost is fine."""

from dataclasses import dataclass, replace

from torch import Tensor

from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import Rows

MAX_WINDOW = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMask:
    """A query sees a key iff all terms hold: same document, not padding, and those below.

    causal: key position <= query position.
    window: |query position - key position| < window, so 1 is the token itself; a tuple has one window per query head.
    sinks: keys of the first `sinks` positions of the document are seen from outside the window too.
    neighborhood: the key lies in the query's neighborhood on the grid.
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
        """Whether all heads see the same."""
        return not isinstance(self.window, tuple)

    def of_heads(self, heads: slice) -> "AttentionMask":
        """Return what these of the query heads see."""
        return replace(self, window=self.window[heads]) if isinstance(self.window, tuple) else self

    def by_heads(self, num_heads: int) -> dict["AttentionMask", list[int]]:
        """Return uniform visibilities and the query heads of each; raises ValueError for another number of windows."""
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
        """Return the definition itself, bool `[queries, keys]`; quadratic, for references and irregular tiles."""
        return self.mask_mod(
            queries.position[:, None], queries.document[:, None], keys.position[None, :], keys.document[None, :]
        )

    def mask_mod(self, position: Tensor, document: Tensor, key_position: Tensor, key_document: Tensor) -> Tensor:
        """Return whether queries see keys, bool of the shape that the four tensors have when broadcast together.

        Nothing is changed in place: torch's compiler makes part of FlexAttention's kernel of this.
        """
        assert not isinstance(self.window, tuple), "every head has a mask of its own: see by_heads"
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

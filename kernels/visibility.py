"""Visibility: which key rows a query row may attend to, said as data."""

from dataclasses import dataclass

from torch import Tensor

from farspan.kernels.rows import Rows

MAX_WINDOW = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Visibility:
    """The AND of the terms that are set; two rows of different documents, and padding, never see each other.

    causal: a query sees no key at a later position.
    window: a query sees only keys fewer than `window` positions away.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a query always sees its own position")
        if self.window is not None and self.window > MAX_WINDOW:
            raise ValueError(
                f"window={self.window} must be at most {MAX_WINDOW}, as positions are int32; None is no window"
            )

    def mask(self, queries: Rows, keys: Rows) -> Tensor:
        """Return the definition itself, bool `[queries, keys]`; quadratic, for references and irregular tiles."""
        query_document, key_document = queries.document[:, None], keys.document[None, :]
        distance = queries.position[:, None] - keys.position[None, :]
        visible = (query_document == key_document) & (query_document >= 0)
        if self.causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= distance.abs() < self.window
        return visible

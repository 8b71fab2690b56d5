"""Masks as intervals of key ranks, so that a kernel compares two numbers instead of documents, positions and windows.

Keys are ranked by document and position. The keys that a query attends to are then one interval of ranks: those of its
document, not later than the query, inside the window. Sinks are a second interval; a neighborhood is none, and is
compared apart (packed_coordinates.py).
"""

from dataclasses import dataclass

import numpy as np

from farspan.kernels.masks.attention_mask import MAX_WINDOW, AttentionMask
from farspan.kernels.masks.rows import Rows


@dataclass(frozen=True, slots=True, eq=False)
class KeyRanks:
    """Keys by document and position: `rank` int32 `[keys]`, -1 for padding; `ordered` int64, ascending."""

    rank: np.ndarray
    ordered: np.ndarray

    @staticmethod
    def of(keys: Rows) -> "KeyRanks":
        """Rank the keys that are not padding."""
        document = keys.document.numpy()
        code = _code(document, keys.position.numpy())
        tokens = np.flatnonzero(document >= 0)
        order = tokens[np.argsort(code[tokens], kind="stable")]
        rank = np.full(len(keys), -1, dtype=np.int32)
        rank[order] = np.arange(len(order))
        return KeyRanks(rank, code[order])

    def near(self, queries: Rows, attention_mask: AttentionMask) -> np.ndarray:
        """Return the first and last rank of each query's window, without sinks, int32 `[2, queries]`; -1 last if none.

        `attention_mask` has one window at most.
        """
        assert not isinstance(attention_mask.window, tuple)
        position = queries.position.numpy().astype(np.int64)
        low, high = np.zeros_like(position), np.full_like(position, MAX_WINDOW)
        if attention_mask.window is not None:
            low = np.maximum(position - attention_mask.window + 1, 0)
            high = np.minimum(position + attention_mask.window - 1, MAX_WINDOW)
        return self._between(queries, low, np.minimum(high, position) if attention_mask.causal else high)

    def sinks(self, queries: Rows, attention_mask: AttentionMask) -> np.ndarray:
        """Return the same of the first `attention_mask.sinks` positions."""
        position = queries.position.numpy().astype(np.int64)
        high = np.full_like(position, attention_mask.sinks - 1)
        return self._between(
            queries, np.zeros_like(position), np.minimum(high, position) if attention_mask.causal else high
        )

    def _between(self, queries: Rows, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        document = queries.document.numpy()
        first = np.searchsorted(self.ordered, _code(document, low), side="left")
        last = np.searchsorted(self.ordered, _code(document, high), side="right") - 1
        return np.stack((first, np.where(document < 0, -1, last))).astype(np.int32)


def _code(document: np.ndarray, position: np.ndarray) -> np.ndarray:
    # One number that sorts as (document, position).
    return document.astype(np.int64) << 32 | position

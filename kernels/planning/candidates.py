"""Candidates: the pairs of groups of rows that may see each other, found without looking at all pairs."""

from collections.abc import Iterator

import numpy as np

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planning.bounds import Bounds, may_see

MAX_CANDIDATES = 1 << 20
"""Pairs of groups that are looked at in one go."""


def candidates(queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield stretches of the pairs (query group, key group), in order, whose bounds do not rule out a visible pair.

    Keys sorted by document hold the candidates of a query in one stretch, so that time and memory follow the pairs
    of groups that share documents, not all pairs.
    """
    if not len(queries) or not len(keys):
        return
    order = np.argsort(keys.document_low, kind="stable")
    # The furthest document that any key up to here reaches: sorted too, though the keys' own highs need not be.
    reach = np.maximum.accumulate(keys.document_high[order])
    first = np.searchsorted(reach, queries.document_low, side="left")
    stop = np.searchsorted(keys.document_low[order], queries.document_high, side="right")
    counts = np.maximum(stop - first, 0)
    ends = np.cumsum(counts)
    start = 0
    while start < len(queries):
        # A block of queries, at least one, with about MAX_CANDIDATES candidates.
        limit = (ends[start - 1] if start else 0) + MAX_CANDIDATES
        block = np.arange(start, max(start + 1, int(np.searchsorted(ends, limit, side="right"))))
        i = np.repeat(block, counts[block])
        nth = np.arange(len(i)) - np.repeat(np.cumsum(counts[block]) - counts[block], counts[block])
        j = order[np.repeat(first[block], counts[block]) + nth]
        may = may_see(queries.take(i), keys.take(j), attention_mask)
        i, j = i[may], j[may]
        ascending = np.lexsort((j, i))
        yield i[ascending], j[ascending]
        start = int(block[-1]) + 1

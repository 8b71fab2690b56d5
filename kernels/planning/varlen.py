"""Varlen calls: attention of packed documents as a library computes many of them at once, whatever their lengths.

A library with `cu_seqlens` takes sequences one after another, queries and keys apart, and is causal from the bottom
right: with T queries and S keys, query i sees keys 0 to i + S - T. Both sides sorted by document and position, each
query of a causal mask sees a first part of its document's keys; where these counts grow by one from query to query, or
not at all, the queries are one sequence, causal or full. Other counts start a new one.

Example: a document of 12 tokens on two ranks, zigzag; rank 0 has its tokens 0 1 2 9 10 11, rank 1 has 3 to 8.

    rank 0's queries, its own keys     counts 1 2 3 4 5 6: one causal sequence of 6 queries and 6 keys
    rank 0's queries, rank 1's keys    counts 0 0 0 6 6 6: three queries see none; one full sequence of 3 and 6
    all keys (gather), rank 0          counts 1 2 3 10 11 12: causal, 3 queries of 3 keys and 3 queries of 12 keys

Sequences of one document share keys, so that each goes into another call; one call holds those of all documents.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from farspan.kernels.masks.rows import Rows, ordinal
from farspan.kernels.ragged import ranges

MOST_CALLS = 8
"""Rows that need more, such as random ones, form no sequences."""


@dataclass(frozen=True, slots=True)
class VarlenSequence:
    """Queries [query_start, query_stop) of a document and the keys [key_start, key_stop) that they see, both sorted."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool

    @property
    def queries(self) -> int:
        return self.query_stop - self.query_start

    @property
    def keys(self) -> int:
        return self.key_stop - self.key_start

    @property
    def pairs(self) -> int:
        """The number of visible (query, key) pairs."""
        return self.queries * self.keys - (self.queries * (self.queries - 1) // 2 if self.causal else 0)


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """Sequences of one call; none has no query or no key. queries, keys: their rows, int64, in the call's order."""

    sequences: Sequence[VarlenSequence]
    queries: np.ndarray
    keys: np.ndarray

    @property
    def causal(self) -> bool:
        return self.sequences[0].causal


@dataclass(frozen=True, slots=True, eq=False)
class VarlenRows:
    """Rows of a plan without a window or a neighborhood as sequences; see the example above.

    queries, keys: the sorted rows that `sequences` count in, int64. number: the call of each sequence.
    """

    queries: np.ndarray
    keys: np.ndarray
    sequences: Sequence[VarlenSequence]
    number: Sequence[int]

    @staticmethod
    def of(queries: Rows, keys: Rows, *, causal: bool) -> "VarlenRows | None":
        """Return the sequences, or None where they would take more than MOST_CALLS calls of a kind."""
        key_order, key_ordinal = _sorted(keys)
        query_order, query_ordinal = _sorted(queries)
        document = query_ordinal >> 32
        first = np.searchsorted(key_ordinal, document << 32)
        # Later keys than the query are hidden, or those of later documents only.
        stop = np.searchsorted(key_ordinal, query_ordinal if causal else (document << 32) | 0xFFFFFFFF, side="right")
        seeing = np.flatnonzero(stop > first)
        sequences = _sequences(document[seeing], first[seeing], stop[seeing], causal)
        if sequences is None:
            return None
        # The nth sequence of a document, whose keys begin where no other's do, goes into the nth call of its kind.
        seen: Counter[tuple[int, bool]] = Counter()
        number = []
        for sequence in sequences:
            number.append(seen[sequence.key_start, sequence.causal])
            seen[sequence.key_start, sequence.causal] += 1
        if max(number, default=0) >= MOST_CALLS:
            return None
        return VarlenRows(query_order[seeing], key_order, sequences, number)

    def call(self, sequences: Sequence[VarlenSequence]) -> VarlenCall:
        """Return a call of these sequences, which share no keys."""
        starts = np.array([(x.query_start, x.key_start) for x in sequences])
        stops = np.array([(x.query_stop, x.key_stop) for x in sequences])
        rows = self.queries[ranges(starts[:, 0], stops[:, 0])], self.keys[ranges(starts[:, 1], stops[:, 1])]
        return VarlenCall(sequences, *rows)


def _sorted(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are not padding by document and position, and their ordinals, int64."""
    found = ordinal(rows.document, rows.position).numpy()
    order = np.argsort(found, kind="stable")
    # Ordinals of padding are negative.
    order = order[np.searchsorted(found[order], 0) :]
    return order, found[order]


def _sequences(document: np.ndarray, first: np.ndarray, stop: np.ndarray, causal: bool) -> list[VarlenSequence] | None:
    """Cut queries that see keys [first, stop) into sequences; None for too many."""
    if not len(document):
        return []
    growth = np.where(np.diff(document) == 0, np.diff(stop), -1)
    # Where the run of equal growth ends that each row begins: rows up to there are one sequence.
    borders = np.append(np.flatnonzero(np.diff(growth)) + 1, len(growth))
    most = MOST_CALLS * 2 * (1 + int((growth < 0).sum()))
    found: list[VarlenSequence] = []
    row = 0
    while row < len(document):
        end = row + 1
        if row < len(growth) and growth[row] in (0, 1):
            end = int(borders[np.searchsorted(borders, row, side="right")]) + 1
        # A single query is both; causal ones are the more.
        is_causal = causal and (end == row + 1 or bool(growth[row] == 1))
        found.append(VarlenSequence(row, end, int(first[row]), int(stop[end - 1]), is_causal))
        if len(found) > most:
            return None
        row = end
    return found

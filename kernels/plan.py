r"""Plan: the regions of the query x key grid that hold visible pairs, found without looking at every pair.

Rows usually come in runs: stretches of one document whose positions grow by a constant step (1 for contiguous and
zigzag shards, the degree for striped ones). Between two runs of the same step visibility is a band, and a band is
cut exactly into rectangles that are seen in full and triangles aligned with their top-left corner. Only windows and
irregular rows (many tiny documents, gathered tokens) leave rectangles whose mask has to be computed.

    keys ->  0.........h..........m
    query 0  ##########                  # full: these keys are earlier than every query of the run
             ##########\
          n  ##########\\               \ causal: key j of the triangle is visible to query i iff j <= i
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility

IRREGULAR_TILE = 128
"""Rows per tile where rows form no runs."""
MAX_CANDIDATES = 1 << 20
"""Pairs of segments that are looked at in one go."""


class Kind(enum.Enum):
    """How the pairs of a region are visible."""

    FULL = "full"  # all pairs
    CAUSAL = "causal"  # key j of the region to query i of the region iff j <= i
    MASKED = "masked"  # as Visibility.mask of the region's rows says


@dataclass(frozen=True, slots=True)
class Region:
    """Query rows [query_start, query_stop) against key rows [key_start, key_stop)."""

    kind: Kind
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int

    @property
    def queries(self) -> slice:
        return slice(self.query_start, self.query_stop)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which query rows attend to which key rows, and the disjoint regions that hold every visible pair."""

    queries: Rows
    keys: Rows
    visibility: Visibility
    regions: tuple[Region, ...]

    @staticmethod
    def build(queries: Rows, keys: Rows, visibility: Visibility, *, shortest_run: int = 32) -> "Plan":
        """Plan attention of `queries` to `keys`; runs shorter than `shortest_run` rows are tiled instead."""
        regions = tuple(_merge_full(_regions(queries, keys, visibility, shortest_run)))
        return Plan(queries=queries, keys=keys, visibility=visibility, regions=regions)

    @cached_property
    def visible_pairs(self) -> int:
        """The number of visible (query, key) pairs: the work that attention cannot avoid, per head."""
        return sum(self._pairs(region) for region in self.regions)

    def _pairs(self, region: Region) -> int:
        num_queries = region.query_stop - region.query_start
        num_keys = region.key_stop - region.key_start
        if region.kind is Kind.FULL:
            return num_queries * num_keys
        if region.kind is Kind.CAUSAL:
            edge = min(num_queries, num_keys)
            return edge * (edge + 1) // 2 + (num_queries - edge) * num_keys
        return int(self.mask(region).sum())

    def mask(self, region: Region) -> Tensor:
        """Return which pairs of the region are visible, bool `[region's queries, region's keys]`."""
        return self.visibility.mask(_slice(self.queries, region.queries), _slice(self.keys, region.keys))


def _slice(rows: Rows, where: slice) -> Rows:
    return Rows(position=rows.position[where], document=rows.document[where])


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows [start, stop) with the bounds of those that are not padding.

    step: the constant growth of positions in a run, None where irregular. padded: some of the rows are padding.
    """

    start: int
    stop: int
    step: int | None
    position_low: int
    position_high: int
    document_low: int
    document_high: int
    padded: bool


def _segments(rows: Rows, shortest_run: int) -> list[_Segment]:
    """Cut rows into runs of one document and constant step, and tiles of irregular rows between them."""
    position, document = rows.position.numpy(), rows.document.numpy()
    growth = np.diff(position.astype(np.int64))
    step = np.where((np.diff(document) == 0) & (document[1:] >= 0) & (growth > 0), growth, 0)
    borders = np.flatnonzero(np.diff(step)) + 1
    starts = np.concatenate(([0], borders)) if len(step) else np.empty(0, dtype=np.int64)
    stops = np.concatenate((borders, [len(step)]))[: len(starts)]
    long_enough = (step[starts] > 0) & (stops - starts + 1 >= shortest_run) if len(starts) else np.empty(0, dtype=bool)

    segments: list[_Segment] = []
    taken = 0
    for start, stop in zip(starts[long_enough].tolist(), stops[long_enough].tolist(), strict=True):
        # Two stretches of steps share the row between them; it belongs to the run that came first.
        first = max(start, taken)
        segments += _irregular_tiles(position, document, taken, first)
        segments.append(_segment(position, document, first, stop + 1, int(step[start])))
        taken = stop + 1
    return segments + list(_irregular_tiles(position, document, taken, len(rows)))


def _irregular_tiles(position: np.ndarray, document: np.ndarray, start: int, stop: int) -> Iterator[_Segment]:
    for tile in range(start, stop, IRREGULAR_TILE):
        tile_stop = min(tile + IRREGULAR_TILE, stop)
        if (document[tile:tile_stop] >= 0).any():
            yield _segment(position, document, tile, tile_stop, None)


def _segment(position: np.ndarray, document: np.ndarray, start: int, stop: int, step: int | None) -> _Segment:
    real = document[start:stop] >= 0
    positions, documents = position[start:stop][real], document[start:stop][real]
    bounds = (int(bound) for bound in (positions.min(), positions.max(), documents.min(), documents.max()))
    return _Segment(start, stop, step, *bounds, padded=not real.all())


def _regions(queries: Rows, keys: Rows, visibility: Visibility, shortest_run: int) -> Iterator[Region]:
    query_segments, key_segments = _segments(queries, shortest_run), _segments(keys, shortest_run)
    for i, j in _may_see(query_segments, key_segments, visibility):
        yield from _pair_regions(query_segments[i], key_segments[j], visibility)


def _may_see(queries: list[_Segment], keys: list[_Segment], visibility: Visibility) -> Iterator[tuple[int, int]]:
    """Yield the pairs (query segment, key segment), in order, whose bounds do not rule out a visible pair.

    Keys sorted by document hold the candidates of a query in one stretch, so that time and memory follow the pairs
    of segments that share documents, not all pairs.
    """
    if not queries or not keys:
        return
    q, k = _bounds(queries), _bounds(keys)
    order = np.argsort(k["document_low"], kind="stable")
    # The furthest document that any key up to here reaches: sorted too, though the keys' own highs need not be.
    reach = np.maximum.accumulate(k["document_high"][order])
    first = np.searchsorted(reach, q["document_low"], side="left")
    stop = np.searchsorted(k["document_low"][order], q["document_high"], side="right")
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
        may = k["document_high"][j] >= q["document_low"][i]
        if visibility.causal:
            may &= q["position_high"][i] >= k["position_low"][j]
        if visibility.window is not None:
            may &= q["position_low"][i] - k["position_high"][j] < visibility.window
            may &= k["position_low"][j] - q["position_high"][i] < visibility.window
        i, j = i[may], j[may]
        ascending = np.lexsort((j, i))
        yield from zip(i[ascending].tolist(), j[ascending].tolist(), strict=True)
        start = int(block[-1]) + 1


def _bounds(segments: list[_Segment]) -> dict[str, np.ndarray]:
    """Return each bound of all segments as int64 `[segments]`."""
    names = ("position_low", "position_high", "document_low", "document_high")
    return {name: np.array([getattr(segment, name) for segment in segments], dtype=np.int64) for name in names}


def _pair_regions(query: _Segment, key: _Segment, visibility: Visibility) -> Iterator[Region]:
    if _one_document(query, key) and query.step is not None and query.step == key.step:
        yield from _band_regions(query, key, visibility)
        return
    queries, keys = _tiles(query), _tiles(key)
    for i, j in _may_see(queries, keys, visibility):
        kind = Kind.FULL if _all_see(queries[i], keys[j], visibility) else Kind.MASKED
        yield Region(kind, queries[i].start, queries[i].stop, keys[j].start, keys[j].stop)


def _one_document(query: _Segment, key: _Segment) -> bool:
    return query.document_low == query.document_high == key.document_low == key.document_high


def _all_see(query: _Segment, key: _Segment, visibility: Visibility) -> bool:
    """Whether the bounds prove every pair visible."""
    if query.padded or key.padded:
        return False
    nearest, farthest = query.position_low - key.position_high, query.position_high - key.position_low
    if not _one_document(query, key) or (visibility.causal and nearest < 0):
        return False
    return visibility.window is None or max(abs(nearest), abs(farthest)) < visibility.window


def _tiles(segment: _Segment) -> list[_Segment]:
    """Cut a run into tiles, so that no mask between irregular rows grows with the square of the sequence."""
    if segment.step is None:
        return [segment]
    tiles = []
    for start in range(segment.start, segment.stop, IRREGULAR_TILE):
        stop = min(start + IRREGULAR_TILE, segment.stop)
        low = segment.position_low + (start - segment.start) * segment.step
        high = segment.position_low + (stop - 1 - segment.start) * segment.step
        tiles.append(replace(segment, start=start, stop=stop, position_low=low, position_high=high))
    return tiles


def _band_regions(query: _Segment, key: _Segment, visibility: Visibility) -> Iterator[Region]:
    """Cut two runs of one document and one step: key j is visible to query i iff i + low <= j <= i + high."""
    step = query.step
    assert step is not None
    lead = query.position_low - key.position_low
    num_queries, num_keys = query.stop - query.start, key.stop - key.start
    high, low = num_keys, -num_queries
    if visibility.window is not None:
        # |lead + (i - j) step| < window, solved for j.
        low = (lead - visibility.window) // step + 1
        high = -((-lead - visibility.window) // step) - 1
    if visibility.causal:
        high = min(high, lead // step)
    if low <= -(num_queries - 1):
        yield from _below_diagonal(query.start, query.stop, key.start, key.stop, high)
        return
    assert visibility.window is not None
    # Both edges of the band cut through: short query pieces keep the masked corner small.
    piece = min(max(visibility.window // (4 * step), 64), 512)
    for start in range(0, num_queries, piece):
        stop = min(start + piece, num_queries)
        # Keys from here on are inside the window of every query of the piece.
        whole = min(max(stop - 1 + low, 0), num_keys)
        corner = max(start + low, 0), min(whole, stop + high)
        queries = query.start + start, query.start + stop
        if corner[0] < corner[1]:
            yield Region(Kind.MASKED, *queries, key.start + corner[0], key.start + corner[1])
        yield from _below_diagonal(*queries, key.start + whole, key.stop, start + high - whole)


def _below_diagonal(query_start: int, query_stop: int, key_start: int, key_stop: int, high: int) -> Iterator[Region]:
    """Regions of key j visible to query i iff j <= i + high."""
    if high < 0:
        query_start, high = query_start - high, 0
    if query_start >= query_stop:
        return
    full_stop = min(key_start + high, key_stop)
    if high >= key_stop - key_start - 1:
        full_stop = key_stop
    if full_stop > key_start:
        yield Region(Kind.FULL, query_start, query_stop, key_start, full_stop)
    last = min(key_stop, full_stop + query_stop - query_start)
    if full_stop < last:
        yield Region(Kind.CAUSAL, query_start, query_stop, full_stop, last)


def _merge_full(regions: Iterator[Region]) -> Iterator[Region]:
    """Join full regions of the same queries whose keys follow each other."""
    previous: Region | None = None
    for region in regions:
        if (
            previous is not None
            and previous.kind is region.kind is Kind.FULL
            and previous.queries == region.queries
            and previous.key_stop == region.key_start
        ):
            previous = Region(Kind.FULL, region.query_start, region.query_stop, previous.key_start, region.key_stop)
            continue
        if previous is not None:
            yield previous
        previous = region
    if previous is not None:
        yield previous

r"""Regions: rectangles of the query x key grid that together hold every visible pair, found without looking at each.

Rows usually come in runs: consecutive rows of one document whose positions grow by a constant step (1 for contiguous
and zigzag shards, the degree for striped ones). Between two runs of one step the mask is a band, and a band is cut
exactly into rectangles that are visible in full and triangles: below the diagonal where the future begins, above it
where a window ends. Only neighborhoods, tiny windows and irregular rows (many tiny documents, gathered tokens) leave
rectangles whose mask has to be computed.

    keys ->  0.........h..........m
    query 0  ##########                  # full: these keys are earlier than every query of the run
             ##########\
          n  ##########\\               \ causal: key j of the triangle is visible to query i iff j <= i

Worked example: documents of 96 and 160 tokens, zigzag over 2 ranks, causal. Rank 0 has chunks 0 and 3 of 64 tokens,
rank 1 chunks 1 and 2. Runs, as rows [start, stop) of the shard:

    rank 0    [0, 64) of document 0, positions 0...     [64, 128) of document 1, positions 96...
    rank 1    [0, 32) of document 0, positions 64...    [32, 128) of document 1, positions 0...

    rank 0's queries, its own keys     CAUSAL [0, 64) x [0, 64), CAUSAL [64, 128) x [64, 128)
    rank 0's queries, rank 1's keys    FULL [64, 128) x [32, 128): positions 96... see 0 to 95; document 0 sees none
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.bounds import Bounds, all_unmasked, candidate_pairs

IRREGULAR_TILE = 128
"""Rows per tile where rows form no runs."""


class Kind(enum.Enum):
    """How the pairs of a region are visible."""

    FULL = "full"  # all pairs
    CAUSAL = "causal"  # key j of the region to query i of the region iff j <= i
    ANTICAUSAL = "anticausal"  # key j of the region to query i of the region iff j >= i; as many keys as queries
    MASKED = "masked"  # as AttentionMask.mask of the region's rows says


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


def cut_regions(queries: Rows, keys: Rows, attention_mask: AttentionMask, shortest_run: int) -> tuple[Region, ...]:
    """Disjoint regions that hold every visible pair; runs of fewer rows than `shortest_run` are tiled.

    `attention_mask` is uniform: one window at most.
    """
    query_segments, key_segments = (_segments(rows, attention_mask, shortest_run) for rows in (queries, keys))
    if query_segments.step.any() and key_segments.step.any():
        regions = _regions(queries, keys, query_segments, key_segments, attention_mask)
    else:
        query_tiles, key_tiles = (_tiles(rows, 0, len(rows), attention_mask) for rows in (queries, keys))
        regions = _tile_regions(query_tiles, key_tiles, attention_mask)
    return _merge_full(regions)


@dataclass(frozen=True, slots=True, eq=False)
class _Segments:
    """Consecutive rows [start, stop): runs, with the step of their positions, and irregular tiles, with step 0."""

    start: np.ndarray
    stop: np.ndarray
    step: np.ndarray
    bounds: Bounds

    def extent(self, number: int) -> tuple[int, int]:
        return int(self.start[number]), int(self.stop[number])

    def run(self, number: int) -> "_Run":
        """One segment; its position is meaningless where rows are irregular."""
        return _Run(*self.extent(number), int(self.step[number]), int(self.bounds.position_low[number]))


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [start, stop) of one document, at positions `position`, `position` + step, ..."""

    start: int
    stop: int
    step: int
    position: int


def _segments(rows: Rows, attention_mask: AttentionMask, shortest_run: int) -> _Segments:
    """Cut rows into runs of one document and constant step, and tiles of irregular rows between them."""
    position, document = rows.position.numpy().astype(np.int64), rows.document.numpy()
    segments: list[tuple[int, int, int]] = []

    def add_tiles(first: int, last: int) -> None:
        segments.extend((tile, min(tile + IRREGULAR_TILE, last), 0) for tile in range(first, last, IRREGULAR_TILE))

    done = 0
    # A band has two borders, which regions follow exactly; a neighborhood has too many for that.
    runs = _runs(position, document, shortest_run) if attention_mask.neighborhood is None else []
    for first, stop, step in runs:
        add_tiles(done, first)
        # Sinks are visible from outside the window, unlike the rest of their run.
        border = first + min(max(-(-(attention_mask.sinks - int(position[first])) // step), 0), stop - first)
        segments += ((a, b, step) for a, b in ((first, border), (border, stop)) if a < b)
        done = stop
    add_tiles(done, len(rows))
    start, stop, step = np.array(segments, dtype=np.int64).reshape(-1, 3).T
    return _Segments(start, stop, step, Bounds.of(rows, start, stop, attention_mask))


def _runs(position: np.ndarray, document: np.ndarray, shortest_run: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, step) of the runs: rows of one document whose positions grow by a constant step, in order."""
    growth = np.diff(position)
    step = np.where((np.diff(document) == 0) & (document[1:] >= 0) & (growth > 0), growth, 0)
    if not len(step):
        return
    borders = np.flatnonzero(np.diff(step)) + 1
    starts, stops = np.concatenate(([0], borders)), np.concatenate((borders, [len(step)]))
    long_enough = (step[starts] > 0) & (stops - starts + 1 >= shortest_run)
    done = 0
    for start, stop in zip(starts[long_enough].tolist(), stops[long_enough].tolist(), strict=True):
        # n equal steps are n + 1 rows: two runs share the row between them, which belongs to the first.
        yield max(start, done), stop + 1, int(step[start])
        done = stop + 1


def _regions(
    queries: Rows, keys: Rows, query_segments: _Segments, key_segments: _Segments, attention_mask: AttentionMask
) -> Iterator[Region]:
    window = attention_mask.window
    assert not isinstance(window, tuple)
    tiles_of_query = cache(lambda i: _tiles(queries, *query_segments.extent(i), attention_mask))
    tiles_of_key = cache(lambda j: _tiles(keys, *key_segments.extent(j), attention_mask))
    for i, j in _pairs(query_segments, key_segments, attention_mask).tolist():
        query, key = query_segments.run(i), key_segments.run(j)
        one_document = query_segments.bounds.document_low[i] == key_segments.bounds.document_low[j]
        if query.step and query.step == key.step and one_document:
            # `_segments` cut runs at the last sink, so a run is all sinks, visible from everywhere, or has none.
            is_sink = key_segments.bounds.position_high[j] < attention_mask.sinks
            yield from _band_regions(query, key, attention_mask.causal, None if is_sink else window)
        else:
            yield from _tile_regions(tiles_of_query(i), tiles_of_key(j), attention_mask)


def _tile_regions(queries: _Segments, keys: _Segments, attention_mask: AttentionMask) -> Iterator[Region]:
    """Regions of irregular rows, and of runs of different steps: tiles, masked unless bounds prove them full."""
    pairs = _pairs(queries, keys, attention_mask)
    full = all_unmasked(queries.bounds.take(pairs[:, 0]), keys.bounds.take(pairs[:, 1]), attention_mask)
    extents = (queries.start[pairs[:, 0]], queries.stop[pairs[:, 0]], keys.start[pairs[:, 1]], keys.stop[pairs[:, 1]])
    for is_full, *extent in zip(full.tolist(), *(values.tolist() for values in extents), strict=True):
        yield Region(Kind.FULL if is_full else Kind.MASKED, *extent)


def _tiles(rows: Rows, start: int, stop: int, attention_mask: AttentionMask) -> _Segments:
    """Cut rows [start, stop) into tiles, so that no mask between irregular rows grows with the square of the rows."""
    starts = np.arange(0, stop - start, IRREGULAR_TILE)
    stops = np.minimum(starts + IRREGULAR_TILE, stop - start)
    bounds = Bounds.of(rows.slice(slice(start, stop)), starts, stops, attention_mask)
    return _Segments(start + starts, start + stops, np.zeros_like(starts), bounds)


def _pairs(queries: _Segments, keys: _Segments, attention_mask: AttentionMask) -> np.ndarray:
    """The pairs of segments that may see each other, int64 `[pairs, 2]`, in order."""
    chunks = [np.stack(pair, axis=1) for pair in candidate_pairs(queries.bounds, keys.bounds, attention_mask)]
    return np.concatenate(chunks) if chunks else np.empty((0, 2), dtype=np.int64)


def _band_regions(query: _Run, key: _Run, causal: bool, window: int | None) -> Iterator[Region]:
    """Cut two runs of one document and one step: key j is visible to query i iff i + low <= j <= i + high."""
    step, lead = query.step, query.position - key.position
    num_queries, num_keys = query.stop - query.start, key.stop - key.start
    high, low = num_keys, -num_queries
    if window is not None:
        # |lead + (i - j) step| < window, solved for j.
        low = (lead - window) // step + 1
        high = -((-lead - window) // step) - 1
    if causal:
        high = min(high, lead // step)
    if low <= -(num_queries - 1):
        yield from _below_diagonal(query.start, query.stop, key.start, key.stop, high)
        return
    assert window is not None
    # Both borders of the band cut through: short chunks of queries keep the masked corner small.
    chunk = min(max(window // (4 * step), 64), 512)
    for start in range(0, num_queries, chunk):
        stop = min(start + chunk, num_queries)
        # Keys from here on are inside the window of every query of the chunk.
        inside = min(max(stop - 1 + low, 0), num_keys)
        queries = query.start + start, query.start + stop
        if inside <= start + high + 1:
            yield from _above_diagonal(*queries, key.start, key.start + inside, start + low)
        elif max(start + low, 0) < min(inside, stop + high):
            # A window shorter than the chunk: the two triangles overlap.
            corner = max(start + low, 0), min(inside, stop + high)
            yield Region(Kind.MASKED, *queries, key.start + corner[0], key.start + corner[1])
        yield from _below_diagonal(*queries, key.start + inside, key.stop, start + high - inside)


def _below_diagonal(query_start: int, query_stop: int, key_start: int, key_stop: int, high: int) -> Iterator[Region]:
    """Regions of key j visible to query i iff j <= i + high."""
    # The first queries see nothing where the diagonal starts below them.
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


def _above_diagonal(query_start: int, query_stop: int, key_start: int, key_stop: int, low: int) -> Iterator[Region]:
    """Regions of key j visible to query i iff j >= i + low."""
    # Queries before this one see all keys.
    first = min(query_start + max(-low, 0), query_stop)
    if query_start < first and key_start < key_stop:
        yield Region(Kind.FULL, query_start, first, key_start, key_stop)
    key_start += max(low, 0)
    side = min(query_stop - first, key_stop - key_start)
    if side > 0:
        yield Region(Kind.ANTICAUSAL, first, first + side, key_start, key_start + side)


def _merge_full(regions: Iterator[Region]) -> tuple[Region, ...]:
    """Join full regions of the same queries whose keys follow each other."""
    merged: list[Region] = []
    for region in regions:
        last = merged[-1] if merged and merged[-1].kind is region.kind is Kind.FULL else None
        if last is not None and last.queries == region.queries and last.key_stop == region.key_start:
            merged[-1] = replace(last, key_stop=region.key_stop)
        else:
            merged.append(region)
    return tuple(merged)

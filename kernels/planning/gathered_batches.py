"""A block selection turned into batches of small dense attention problems over gathered rows.

A problem is R query rows times S key rows that attend to each other in full, as a triangle, or under a mask; problems
of one shape share a batch. Worked example: one head, causal, key blocks of two rows A = {0, 1}, B = {2, 3}, C = {4, 5},
D = {6, 7}, and the query rows 3, 4 and 5, each a query block of its own, which select

    query 3: A B        query 4: A C        query 5: A D

Entries (query, key block) fall into three classes:

    full      (3, A) (4, A) (5, A)      one problem [3, 2]: queries 3, 4, 5 x keys 0, 1; A is gathered once
    partial   (3, B) (4, C)             4 sees only the first row of C: a batch of two problems [1, 2] with masks
    empty     (5, D)                    D lies in the future: dropped

(3, B) counts as partial though 3 sees all of B: if query 2 is local too and selects B, rows 2 and 3 form a causal
triangle with B, which needs no mask; without row 3 it would not be one.

Where tiles of rows select (`selects_by_tile`), a problem is instead one tile and all key blocks that it selects, side
by side: [R, S1 + S2 + ...]. Its rows are complete after one problem and need no merging.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planning.bounds import Bounds, all_unmasked, any_unmasked
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.regions import Kind
from farspan.kernels.ragged import Groups, group_equal, ranges, runs

SHARED_ROWS = 16
"""Rows per query block, on average, from which on a query block is worth a tile of its own."""
ENTRIES_AT_ONCE = 1 << 16
"""Pairs of a query block and a key block whose bounds are compared at once: few enough for a cache."""
BATCH_ROWS = 1 << 17
"""Key rows that a batch of several problems may gather: bounds memory."""
BATCH_PAIRS = 1 << 22
"""Pairs that a batch of several problems may have a mask for."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Problems of one shape; a row of a head is numbered row * heads + head.

    queries: int32 or int64 `[problems, R]`, rows of query heads, each at most once. keys: int64 `[problems, S]`, rows
    of KV heads. mask: bool `[problems, R, S]` where kind is MASKED. filler: rows at the end of the last problem that
    repeat its last row only to fill the shape; their results are to be ignored.
    """

    kind: Kind
    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None
    filler: int = 0

    def pairs(self) -> int:
        """The number of visible pairs."""
        problems, rows = self.queries.shape
        if self.mask is not None:
            return int(self.mask.sum())
        if self.kind is Kind.CAUSAL:
            return problems * (rows * (rows + 1) // 2)
        return (problems * rows - self.filler) * self.keys.shape[1]


def selection_batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    """Yield disjoint batches that hold every visible pair of a plan with a selection."""
    assert plan.selection is not None
    assert plan.selection.heads % kv_heads == 0, "query heads that share a selection share a KV head"
    query_block = plan.selection.query_block.masked_fill(plan.queries.document < 0, -1)
    query_blocks = Groups.by(query_block.numpy())
    key_blocks = Groups.by(plan.selection.blocks.of(plan.keys).numpy())
    if not len(query_blocks) or not len(key_blocks):
        return
    for part in plan.parts:
        yield from _Builder(plan, part, query_blocks, key_blocks, kv_heads).batches()


def selects_by_tile(plan: Plan, *, count_padding: bool) -> bool:
    """Whether query blocks are tiles of rows rather than (nearly) single rows.

    Backends differ in the rows they count: CPU batches count padding (`count_padding`), Triton's row blocks do not. On
    a shard that is mostly padding the two may decide differently; both decisions are correct.
    """
    assert plan.selection is not None
    query_block = plan.selection.query_block
    rows = len(query_block) if count_padding else int((query_block >= 0).sum())
    return rows >= SHARED_ROWS * plan.selection.num_query_blocks


def count_pairs(plan: Plan, kv_heads: int) -> int:
    """The number of visible (query, key) pairs of a plan with a selection, the mean over heads."""
    return sum(batch.pairs() for batch in selection_batches(plan, kv_heads)) // plan.heads


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Pairs of a list and a key block on it: int32 `[entries]` each, in the order of lists."""

    list: np.ndarray
    key_block: np.ndarray

    def where(self, condition: np.ndarray) -> "_Entries":
        index = np.flatnonzero(condition)
        return self if len(index) == len(self) else _Entries(self.list[index], self.key_block[index])

    def __len__(self) -> int:
        return len(self.list)


class _Builder:
    """Batches of the query heads that share one attention mask; query_blocks and key_blocks are local rows, by block.

    head_groups: the heads, by head group. queries: by list that has such heads and rows, the rows of its query block in
    each query head of its head group. head_group, query_block: of each such list, int32 indices `[lists]`.
    """

    def __init__(self, plan: Plan, part: HeadPlan, query_blocks: Groups, key_blocks: Groups, kv_heads: int) -> None:
        assert plan.selection is not None
        self.plan, self.selection, self.attention_mask = plan, plan.selection.as_lists, part.attention_mask
        self.query_blocks, self.key_blocks, self.kv_heads = query_blocks, key_blocks, kv_heads
        heads = np.array(part.heads)
        self.head_groups = replace(Groups.by(heads // (plan.heads // plan.selection.heads)), member=heads)
        # List number = head group * Q + query block: each group repeats for all blocks, all blocks for each group.
        group = np.repeat(self.head_groups.of_number(plan.selection.heads), plan.selection.num_query_blocks)
        block = np.tile(query_blocks.of_number(plan.selection.num_query_blocks), plan.selection.heads)
        local = np.flatnonzero((group >= 0) & (block >= 0))
        self.head_group, self.query_block = group, block = group[local], block[local]
        of_row = np.repeat(group, query_blocks.sizes()[block])
        rows = np.repeat(query_blocks.members(block), self.head_groups.sizes()[of_row])
        queries = rows * plan.heads + self.head_groups.members(of_row)
        # Entries are gathered from this table by the million: half the width is half the time.
        narrow = len(plan.queries) * plan.heads <= np.iinfo(np.int32).max
        queries = queries.astype(np.int32 if narrow else np.int64)
        sizes = query_blocks.sizes()[block] * self.head_groups.sizes()[group]
        self.queries = Groups(local, queries, sizes.cumsum() - sizes, sizes.cumsum())

    def entries(self) -> _Entries:
        """The entries whose query block and key block both have local rows."""
        counts = self.selection.offsets.diff().numpy()
        of_entry = np.repeat(self.queries.of_number(len(counts)), counts)
        block = self.key_blocks.of_number(self.selection.blocks.count)[self.selection.key_blocks.numpy()]
        return _Entries(of_entry, block).where((block >= 0) & (of_entry >= 0))

    def batches(self) -> Iterator[Batch]:
        entries, by_tile = self.entries(), selects_by_tile(self.plan, count_padding=True)
        full, partial = self._classify(entries, keep_triangles=self.attention_mask.causal and not by_tile)
        yield from self._per_tile(entries.where(full)) if by_tile else self._per_key_block(entries.where(full))
        yield from self._partial(entries.where(partial))

    def _classify(self, entries: _Entries, *, keep_triangles: bool) -> tuple[np.ndarray, np.ndarray]:
        """Whether all pairs of each entry are visible, and whether only some may be; bool `[entries]` each.

        keep_triangles: a key block's last row, which sees all of it, counts as partial: with the rows before it, it
        forms a causal triangle; without it they need a mask.
        """
        query_bounds, key_bounds = (
            Bounds.of(rows.take(torch.from_numpy(of.member)), of.start, of.stop, self.attention_mask)
            for rows, of in ((self.plan.queries, self.query_blocks), (self.plan.keys, self.key_blocks))
        )
        full, partial = (np.empty(len(entries), dtype=bool) for _ in range(2))
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            chunk = slice(start, start + ENTRIES_AT_ONCE)
            queries = query_bounds.take(self.query_block[entries.list[chunk]])
            keys = key_bounds.take(entries.key_block[chunk])
            all_visible = all_unmasked(queries, keys, self.attention_mask)
            if keep_triangles:
                all_visible &= queries.position_low != keys.position_high
            full[chunk] = all_visible
            partial[chunk] = ~all_visible & any_unmasked(queries, keys, self.attention_mask)
        return full, partial

    def _per_key_block(self, entries: _Entries) -> Iterator[Batch]:
        """One problem per key block and KV head: all rows that select it, so its keys are gathered once."""
        kv_head = self._kv_head(self.head_group)
        for same_keys in group_equal(kv_head[entries.list] * len(self.key_blocks) + entries.key_block):
            of_entry = entries.list[same_keys]
            queries = self.queries.members(of_entry)[None]  # [1, R]
            keys = self.key_blocks.members(entries.key_block[same_keys[:1]])[None]  # [1, S]
            keys = keys * self.kv_heads + kv_head[of_entry[0]]
            yield _split_over_threads(queries, keys)

    def _per_tile(self, entries: _Entries) -> Iterator[Batch]:
        """One problem per query block and head group: all key blocks that it selects, side by side."""
        if not len(entries):
            return
        first, stop = runs(entries.list)
        keys = np.add.reduceat(self.key_blocks.sizes()[entries.key_block], first)
        of_problem = entries.list[first]
        rows = self.queries.sizes()[of_problem]
        for same_shape in group_equal(rows * (keys.max() + 1) + keys):
            num_rows, num_keys = int(rows[same_shape[0]]), int(keys[same_shape[0]])
            for chunk in _chunks(same_shape, num_keys, BATCH_ROWS):
                key_block = entries.key_block[ranges(first[chunk], stop[chunk])]
                kv_head = np.repeat(self._kv_head(self.head_group[of_problem[chunk]]), num_keys)
                key_rows = self.key_blocks.members(key_block) * self.kv_heads + kv_head
                queries = self.queries.members(of_problem[chunk])
                # [problems, R] and [problems, S]
                yield _split_over_threads(queries.reshape(-1, num_rows), key_rows.reshape(-1, num_keys))

    def _partial(self, entries: _Entries) -> Iterator[Batch]:
        """Entries of which only some pairs are visible: triangles where rows and keys match, else masks."""
        if not len(entries):
            return
        # Every query head by itself: only then can a problem's rows form a triangle with its keys.
        group = self.head_group[entries.list]
        head = self.head_groups.members(group)
        entry = np.repeat(np.arange(len(entries)), self.head_groups.sizes()[group])
        query_block, key_block = self.query_block[entries.list[entry]], entries.key_block[entry]
        # A batch may contain a row once only: the n-th partial key block of a row goes to round n.
        order = np.lexsort((key_block, query_block, head))
        query_block, key_block, head = (x[order] for x in (query_block, key_block, head))
        start, stop = runs(head * len(self.query_blocks) + query_block)
        nth = ranges(np.zeros_like(start), stop - start)
        order = np.lexsort((query_block, key_block, head, nth))
        query_block, key_block, head, nth = (x[order] for x in (query_block, key_block, head, nth))
        # A problem is the rows of one round and head with one key block.
        first, stop = runs((nth * self.plan.heads + head) * len(self.key_blocks) + key_block)
        rows = np.add.reduceat(self.query_blocks.sizes()[query_block], first)
        keys = self.key_blocks.sizes()[key_block[first]]
        for same_shape in group_equal((nth[first] * (rows.max() + 1) + rows) * (keys.max() + 1) + keys):
            num_rows, num_keys = int(rows[same_shape[0]]), int(keys[same_shape[0]])
            for chunk in _chunks(same_shape, num_rows * num_keys, BATCH_PAIRS):
                row = self.query_blocks.members(query_block[ranges(first[chunk], stop[chunk])])
                key = self.key_blocks.members(key_block[first[chunk]])
                yield from self._partial_batches(
                    torch.from_numpy(row.reshape(-1, num_rows)),  # [problems, R]
                    torch.from_numpy(key.reshape(-1, num_keys)),  # [problems, S]
                    torch.from_numpy(head[first[chunk], None]),  # [problems, 1]
                )

    def _partial_batches(self, queries: Tensor, keys: Tensor, head: Tensor) -> Iterator[Batch]:
        """At most two batches of rows `[problems, R]` and `[problems, S]`, each of one query head `[problems, 1]`."""
        position, document = self.plan.queries.position[queries], self.plan.queries.document[queries]
        key_position, key_document = self.plan.keys.position[keys], self.plan.keys.document[keys]
        triangle = torch.zeros(len(queries), dtype=torch.bool)
        if queries.shape == keys.shape and self.attention_mask == AttentionMask(causal=True):
            ascending = (position.diff(dim=1) > 0).all(dim=1)
            one = document[:, :1]
            one_document = ((document == one) & (key_document == one)).all(dim=1)
            triangle = ascending & one_document & (position == key_position).all(dim=1)
        query_index = queries * self.plan.heads + head
        key_index = keys * self.kv_heads + head // (self.plan.heads // self.kv_heads)
        if triangle.any():
            yield Batch(Kind.CAUSAL, query_index[triangle], key_index[triangle])
        if not triangle.all():
            rest = ~triangle
            mask = self.attention_mask.mask_mod(  # [problems, R, 1] against [problems, 1, S]
                position[rest, :, None], document[rest, :, None], key_position[rest, None], key_document[rest, None]
            )
            yield Batch(Kind.MASKED, query_index[rest], key_index[rest], mask)

    def _kv_head(self, head_group: np.ndarray) -> np.ndarray:
        """The KV head of these head groups, int32."""
        kv_head = self.head_groups.member[self.head_groups.start] // (self.plan.heads // self.kv_heads)
        return kv_head.astype(np.int32)[head_group]


def _chunks(problems: np.ndarray, size: int, budget: int) -> list[np.ndarray]:
    """Split problems of one size into chunks of about `budget` together, of one problem at least."""
    return np.array_split(problems, min(-(-len(problems) * size // budget), len(problems)))


def _split_over_threads(queries: np.ndarray, keys: np.ndarray) -> Batch:
    """A batch of full problems; few problems are cut into one part of their rows for each thread."""
    problems, rows = queries.shape
    count = 1 if problems >= 2 * torch.get_num_threads() else torch.get_num_threads()
    filler = -rows % count
    if rows < count or (filler and problems > 1):
        count, filler = 1, 0
    if filler:
        queries = np.concatenate((queries, queries[:, -1:].repeat(filler, axis=1)), axis=1)
    # [problems, R + filler] -> [problems * count, (R + filler) / count]
    queries, keys = queries.reshape(problems * count, -1), keys.repeat(count, axis=0)
    return Batch(Kind.FULL, torch.from_numpy(queries), torch.from_numpy(keys), filler=filler)

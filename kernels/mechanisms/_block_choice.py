"""Choices of blocks made on a device: what MoBA, VMoBA, SpargeAttn and VGGT have in common there.

What rows and blocks decide is planned once per sequence on the host and sent to the device. A layer launches kernels,
as many at any length, and waits for nothing. Triton need not be installed: it is imported at the first choice.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.packed_selection import PackedSelection, num_words, numbers_pay
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition
from farspan.kernels.planning.choice_tiles import BlockCandidates, ChoiceTiles, Ranking, choice_tiles
from farspan.kernels.ragged import offsets_of

if TYPE_CHECKING:
    from farspan.kernels.triton_kernels.block_choice import Rule
    from farspan.kernels.triton_kernels.block_means import Members

MAX_INT = (1 << 31) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """The local queries that choose: rows, or tiles of rows. Q is their number.

    query_block: the query of each local row, int64 `[rows]`, -1 for padding. document: of each query, an index in the
    partition's documents, int64 `[Q]`, -1 for padding. first, last: its positions, int64 `[Q]`.
    """

    query_block: Tensor
    document: Tensor
    first: Tensor
    last: Tensor
    are_tiles: bool

    @staticmethod
    def rows(local_shard: LocalShard) -> "Queries":
        """Every row by itself."""
        block, position = local_shard.key_block_of_row, local_shard.rows.position.long()
        # One more block, that of padding, is of no document.
        document = torch.cat((local_shard.key_blocks.document, block.new_full((1,), -1)))[block]
        query_block = torch.arange(len(block)).masked_fill(block < 0, -1)
        return Queries(query_block, document, position, position, are_tiles=False)

    @staticmethod
    def tiles(local_shard: LocalShard) -> "Queries":
        """The query blocks with local rows."""
        tile, query_block = local_shard.local_query_blocks
        first, last = local_shard.query_block_extent
        document = local_shard.query_blocks.document[tile]
        return Queries(query_block, document, first[tile], last[tile], are_tiles=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockChoice:
    """What the choices of a local shard's queries need on a device, made once.

    ranking: of each query's blocks; None for a joint ranking. least: the least number of blocks that each query of a
    document chooses, int64 `[documents]`. most: no query has more. names_own: whether the rule names a query's own
    blocks. compares: whether tiles and blocks take part in the ranking by the likeness of their rows. competes: if the
    rows alone decide it, which key blocks, bool `[blocks]`, and which queries, bool `[Q]`, take part, for all heads.
    """

    local_shard: LocalShard
    device: torch.device
    queries: Queries
    ranking: Ranking | None
    least: Tensor
    most: int
    names_own: bool
    compares: bool = False
    competes: tuple[Tensor, Tensor] | None = None

    @property
    def numbered(self) -> bool:
        """Whether a selection is kept as numbers of blocks, not as bits; tiles are few, and their kernels read bits."""
        by_row = self.ranking is not None and not self.queries.are_tiles
        return by_row and numbers_pay(self.local_shard.key_blocks.count, self.most)

    def prepare(self) -> PackedSelection:
        """Make all that choices need; return one of them with bits of the meta device."""
        made: list[object] = [self.key_members, self.key_counts, self.rule]
        made.append(self.joint_tiles if self.ranking is None else self.tiles)
        if self.queries.are_tiles:
            made += self.query_members, self.query_counts, self.local_tiles
        if self.compares:
            made.append(self._documents)
        heads, queries = self.local_shard.share.local_heads.query, len(self.queries.document)
        width = self.most if self.numbered else num_words(self.local_shard.key_blocks.count)
        return self.selection(torch.empty(queries, heads, width, dtype=torch.int32, device="meta"))

    @cached_property
    def key_members(self) -> "Members":
        return self._members(self.local_shard.key_blocks, self.local_shard.key_rows)

    @cached_property
    def query_members(self) -> "Members":
        return self._members(self.local_shard.query_blocks, self.local_shard.rows)

    def _members(self, partition: BlockPartition, rows: Rows) -> "Members":
        from farspan.kernels.triton_kernels.block_means import Members

        block = partition.of(rows)
        padding, order = int((block < 0).sum()), block.argsort(stable=True)  # padding comes first
        offsets = offsets_of(block[block >= 0].bincount(minlength=partition.count))
        return Members(copy_to(order[padding:].int(), self.device), copy_to(offsets.int(), self.device))

    @cached_property
    def key_counts(self) -> Tensor:
        """Rows of each key block of the sequence, float64 `[blocks]`."""
        return copy_to(self.local_shard.key_blocks.sizes.double(), self.device)

    @cached_property
    def query_counts(self) -> Tensor:
        """Rows of each query block of the sequence, float64 `[blocks]`."""
        return copy_to(self.local_shard.query_blocks.sizes.double(), self.device)

    @cached_property
    def local_tiles(self) -> Tensor:
        """The query blocks with local rows, int32."""
        return copy_to(self.local_shard.local_query_blocks[0].int(), self.device)

    @cached_property
    def tiles(self) -> tuple[ChoiceTiles, ...]:
        """The queries in tiles."""
        from farspan.kernels.triton_kernels.block_choice_launch import shape_for

        ranking = self.ranking
        assert ranking is not None
        tiles = choice_tiles(self._candidates, lambda blocks: shape_for(blocks, ranking).queries)
        return tuple(replace(some, table=copy_to(some.table, self.device)) for some in tiles)

    @cached_property
    def joint_tiles(self) -> Tensor:
        """The same for a joint ranking, which takes documents of any size at once."""
        from farspan.kernels.triton_kernels.joint_choice_launch import QUERIES

        index = (self.queries.document >= 0).nonzero().flatten()
        return copy_to(self._candidates.tiles(index, QUERIES), self.device)

    @cached_property
    def _candidates(self) -> BlockCandidates:
        first, document = self.local_shard.key_blocks.first, self.queries.document
        # Padding, of document -1, gets numbers that mean nothing.
        stop = self._block_at(self.queries.last) + 1 if self._causal else first[document + 1]
        return BlockCandidates(document=document, first=first[document], stop=stop, least=self.least)

    def _block_at(self, position: Tensor) -> Tensor:
        """The key block at a position of each query's document, int64 `[Q]`; of padding it means nothing."""
        blocks = self.local_shard.key_blocks
        # One more position, since there is none where all rows are padding.
        number = torch.cat((blocks.block_in_document, torch.zeros(1, dtype=torch.int32)))
        return blocks.first[self.queries.document] + number[position.clamp(max=len(number) - 1)]

    @property
    def _causal(self) -> bool:
        return self.local_shard.mechanism.attention_mask().causal

    @cached_property
    def rule(self) -> "Rule":
        """Which blocks the queries may choose, and which are their own."""
        from farspan.kernels.triton_kernels.block_choice import Rule

        columns: dict[str, Tensor] = {
            "key_first": self.local_shard.key_block_extent[0].clamp(max=MAX_INT).int(),
            "limit": self.queries.last.int() if self._causal else torch.full_like(self.queries.last, MAX_INT - 1).int(),
        }
        if self.names_own:
            columns["own_first"], columns["own_last"] = (
                self._block_at(position).int() for position in (self.queries.first, self.queries.last)
            )
        if self.competes is not None:
            heads = self.local_shard.share.local_heads
            # [blocks] -> [Hk, blocks], [Q] -> [Hq, Q]
            columns["block_competes"], columns["query_competes"] = (
                x.to(torch.int8).repeat(n, 1) for x, n in zip(self.competes, (heads.kv, heads.query), strict=True)
            )
        return Rule(**{name: copy_to(column, self.device) for name, column in columns.items()})

    def key_means(self, k: Tensor) -> Tensor:
        """Return the means of the keys of each block of the sequence, float64 `[Hk, D, blocks]` of float32 numbers."""
        from farspan.kernels.triton_kernels import block_choice_launch as launch

        total = self.local_shard.all_reduce_sum(launch.sums(k, self.key_members))
        return launch.means(total[0], self.key_counts)

    def query_means(self, q: Tensor, similarity: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the means of the local tiles of queries, float64 `[Q, Hq, D]` of float32 numbers; and, with a
        threshold, whether the mean cosine of a tile's rows exceeds it, int8 `[Hq, Q]`.
        """
        from farspan.kernels.triton_kernels import block_choice_launch as launch

        total = self.local_shard.all_reduce_sum(launch.sums(q, self.query_members, unit=similarity is not None))
        means = launch.means(total[0], self.query_counts, self.local_tiles).permute(2, 0, 1)
        if similarity is None:
            return means, None
        return means, launch.similar(total[1], self.query_counts, similarity, self.local_tiles)

    def similar_blocks(self, k: Tensor, key_means: Tensor, similarity: float) -> Tensor:
        """Return whether the mean cosine of a key block's rows exceeds a threshold, int8 `[Hk, blocks]`.

        The mean key of the document is subtracted from its keys first.
        """
        from farspan.kernels.triton_kernels import block_choice_launch as launch
        from farspan.kernels.triton_kernels.block_means import Shift

        members, counts, document = self._documents
        # [Hk, D, blocks] -> [blocks, Hk, D]; a document's blocks are its rows here.
        of_documents = launch.sums(key_means.permute(2, 0, 1), members, weight=self.key_counts)
        shift = Shift(of_documents[0], counts, document)
        total = self.local_shard.all_reduce_sum(launch.sums(k, self.key_members, plain=False, unit=True, shift=shift))
        return launch.similar(total[0], self.key_counts, similarity)

    @cached_property
    def _documents(self) -> tuple["Members", Tensor, Tensor]:
        """The blocks of each document, its rows, float64 `[documents]`, and the document of each block, int32."""
        from farspan.kernels.triton_kernels.block_means import Members

        blocks = self.local_shard.key_blocks
        order, offsets, document = (
            copy_to(x.int(), self.device) for x in (torch.arange(blocks.count), blocks.first, blocks.document)
        )
        counts = blocks.document.bincount(blocks.sizes.double(), minlength=len(blocks.documents))
        return Members(order, offsets), copy_to(counts, self.device), document

    def choose(
        self,
        q: Tensor,
        key_means: Tensor,
        *,
        scale: float = 1.0,
        block_competes: Tensor | None = None,
        query_competes: Tensor | None = None,
    ) -> PackedSelection:
        """Choose for queries q `[Q, Hq, D]` by their scores, times `scale`, for the blocks of `key_means`.

        block_competes: int8 `[Hk, blocks]`, query_competes: int8 `[Hq, Q]`; where 0, what is visible is chosen.
        """
        from farspan.kernels.triton_kernels import block_choice_launch as launch

        rule = self.rule
        assert self.ranking is not None
        if block_competes is not None:
            rule = rule._replace(block_competes=block_competes, query_competes=query_competes)
        return self.selection(
            launch.choose(
                q, key_means, self.tiles, rule, self.ranking, most=self.most, numbered=self.numbered, scale=scale
            )
        )

    def selection(self, chosen: Tensor) -> PackedSelection:
        """Return the selection of these bits, int32 `[Q, Hq, words]`, or numbers, `[Q, Hq, most]`."""
        return PackedSelection(
            stored=chosen,
            query_block=self.queries.query_block,
            blocks=self.local_shard.key_blocks,
            most=self.most,
            numbered=self.numbered,
        )


class BlockChooser(Routed):
    """A mechanism whose queries choose blocks by kernels, on their device."""

    @abstractmethod
    def choice(self, local_shard: LocalShard, device: torch.device) -> BlockChoice:
        """Return what the choices of a sequence have in common."""

    @abstractmethod
    def choose(self, q: Tensor, k: Tensor, choice: BlockChoice) -> PackedSelection:
        """Make the choice of a layer."""

    @torch.no_grad()
    def select_packed(self, q: Tensor, k: Tensor, local_shard: LocalShard) -> PackedSelection:
        return self.choose(q, k, self._choice_on(q.device, local_shard))

    def prepare(self, local_shard: LocalShard, device: torch.device) -> PackedSelection | None:
        return self._choice_on(device, local_shard).prepare()

    def _choice_on(self, device: torch.device, local_shard: LocalShard) -> BlockChoice:
        return local_shard.once(("choice", device), lambda: self.choice(local_shard, device))


def longest(local_shard: LocalShard) -> int:
    """Return the number of key blocks of the document that has the most."""
    return int(local_shard.key_blocks.first.diff().max()) if local_shard.key_blocks.count else 0

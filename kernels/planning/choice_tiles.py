"""Queries in tiles that choose blocks together on a device, planned once per sequence.

Each tile is of one document, and a launch takes tiles of one size: the number of blocks that its queries choose among,
rounded up to a power of two. Two documents of 40 and of 100 blocks, causal, 4 queries a tile, have tiles of size

    32    queries that see up to 32 blocks of the first document     (words of bits begin at blocks 0, 32, ...)
    64    its others; those of the second that see up to 56 of its blocks, which begin at bit 8 of word 1
    128   the rest

Queries of more blocks than MAX_BLOCKS are all in tiles of one size, the largest that any needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farspan.kernels.masks.packed_selection import WORD
from farspan.kernels.ragged import expand

MAX_BLOCKS = 1 << 12
"""The largest size at which a query's scores for all blocks of its document, from a multiple of 32 on, fit into
registers; where there are more, they are made in chunks."""
HEADER = 4
"""Numbers of a tile in front of its queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """How many of the blocks that compete for a query are chosen: the best ones, and the lower block wins a tie.

    weights: "none", the least number of the query's document. "softmax": or as many as fit into `share` of their
    softmax, if these are more. "scaled": or those up to the block that reaches `share` of the scores, scaled between
    the lowest and the highest, if these are more; and one more than that. own_counts: the query's own block is its
    best; otherwise it is chosen besides, if it is named at all. sink: a document's first block is chosen besides.
    """

    weights: Literal["none", "softmax", "scaled"] = "none"
    share: float = 0.0
    own_counts: bool = False
    sink: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockCandidates:
    """The blocks that each of Q queries chooses among, on the CPU.

    document: int64 `[Q]`, -1 for those that choose nothing. first, stop: the first of the blocks and their end, int64
    `[Q]`. least: the least number of blocks that each query of a document chooses, int64 `[documents]`.
    """

    document: Tensor
    first: Tensor
    stop: Tensor
    least: Tensor

    def sizes(self) -> Tensor:
        """Return the blocks of each query from a multiple of 32 on, rounded up to a power of two; 0 for none.

        Of those beyond MAX_BLOCKS, it is the largest of any.
        """
        span = (self.stop - self.first // WORD * WORD).clamp(min=WORD)
        size = (1 << (span - 1).double().log2().floor().long() + 1).masked_fill(self.document < 0, 0)
        return torch.where(size > MAX_BLOCKS, size.max(), size) if len(size) else size

    def tiles(self, index: Tensor, queries: int) -> Tensor:
        """Return the queries at `index`, int64, in tiles of one document each, int32 `[tiles, HEADER + queries]`.

        A tile is the first of its blocks, their end, the least number to choose, the document, and at most `queries`
        queries; -1 for none.
        """
        index = index[self.document[index].argsort(stable=True)]
        document, counts = self.document[index].unique_consecutive(return_counts=True)
        tiles = -(-counts // queries)
        # The document of each query, among these, and its place there; then its tile.
        nth, place = expand(counts)
        tile = (tiles.cumsum(0) - tiles)[nth] + place // queries
        table = torch.full((int(tiles.sum()), HEADER + queries), -1)
        table[tile, HEADER + place % queries] = index
        table[tile, 0], table[tile, 2], table[tile, 3] = self.first[index], self.least[document][nth], document[nth]
        table[:, 1].scatter_reduce_(0, tile, self.stop[index], "amax")
        return table.int()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChoiceTiles:
    """Tiles of queries that choose among at most `blocks` blocks after a multiple of 32.

    table: int32 `[tiles, HEADER + queries]`, see `BlockCandidates.tiles`.
    """

    blocks: int
    queries: int
    table: Tensor

    @property
    def in_chunks(self) -> bool:
        return self.blocks > MAX_BLOCKS


def choice_tiles(candidates: BlockCandidates, queries_of: Callable[[int], int]) -> tuple[ChoiceTiles, ...]:
    """Return the tiles of all queries by size, the largest first; queries_of: the queries of a tile, by its size."""
    sizes = candidates.sizes()
    return tuple(
        ChoiceTiles(
            blocks=size,
            queries=queries_of(size),
            table=candidates.tiles((sizes == size).nonzero().flatten(), queries_of(size)),
        )
        for size in reversed(sizes[sizes > 0].unique().tolist())
    )

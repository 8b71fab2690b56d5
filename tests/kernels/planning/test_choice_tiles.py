"""Tiles of queries that choose blocks together."""

import pytest
import torch

from farspan.kernels.planning import choice_tiles as planning
from farspan.kernels.planning.choice_tiles import HEADER, BlockCandidates, choice_tiles

# Documents of 40 and of 100 blocks, each query sees the blocks up to its own; two rows of padding between them.
DOCUMENT = torch.tensor([0] * 40 + [-1] * 2 + [1] * 100)
FIRST = torch.where(DOCUMENT == 1, 40, 0)
STOP = torch.cat((torch.arange(1, 41), torch.zeros(2, dtype=torch.int64), torch.arange(41, 141)))
CANDIDATES = BlockCandidates(document=DOCUMENT, first=FIRST, stop=STOP, least=torch.tensor([3, 5]))


def test_each_query_is_in_one_tile_of_its_document_and_size() -> None:
    found: list[int] = []
    for some in choice_tiles(CANDIDATES, lambda blocks: 256 // blocks):
        assert some.queries == 256 // some.blocks
        for first, stop, least, document, *queries in some.table.tolist():
            index = torch.tensor([query for query in queries if query >= 0])
            found += index.tolist()
            assert DOCUMENT[index].tolist() == [document] * len(index)
            assert (first, least) == ((0, 3), (40, 5))[document]
            assert stop == STOP[index].max()
            # Blocks are counted from a multiple of 32; half the size would not do for any query.
            sizes = STOP[index] - first // 32 * 32
            assert sizes.max() <= some.blocks
            assert some.blocks == 32 or sizes.min() > some.blocks // 2
    assert sorted(found) == [i for i in range(len(DOCUMENT)) if DOCUMENT[i] >= 0]


def test_tiles_of_any_size_are_as_full_as_their_documents_allow() -> None:
    table = CANDIDATES.tiles((DOCUMENT >= 0).nonzero().flatten(), 32)
    assert (table[:, HEADER:] >= 0).sum(dim=1).tolist() == [32, 8, 32, 32, 32, 4]
    assert table[:, 3].tolist() == [0, 0, 1, 1, 1, 1]
    assert table[:, 1].tolist() == [32, 40, 72, 104, 136, 140]


def test_no_queries_make_no_tiles() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert choice_tiles(BlockCandidates(document=none, first=none, stop=none, least=none), lambda _: 4) == ()


def test_queries_of_more_blocks_than_registers_hold_share_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document's 40 blocks are 64, the second's 100 begin at block 8 of word 1, and are 128."""
    monkeypatch.setattr(planning, "MAX_BLOCKS", 32)
    large, small = choice_tiles(CANDIDATES, lambda _: 256)
    assert (large.blocks, large.in_chunks, small.blocks, small.in_chunks) == (128, True, 32, False)
    # Blocks 32 to 39 of the first document, 24 to 99 of the second.
    assert [sorted(x for x in tile[HEADER:] if x >= 0) for tile in large.table.tolist()] == [
        list(range(32, 40)), list(range(66, 142))
    ]  # fmt: skip

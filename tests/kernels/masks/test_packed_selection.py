from dataclasses import replace

import pytest
import torch

from farspan.kernels.masks import packed_selection
from farspan.kernels.masks.packed_selection import PackedSelection, number_dtype, numbers_pay
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection


def test_bits_of_the_example() -> None:
    blocks = BlockPartition.blocks(Rows.packed([40]), 1)
    selection = BlockSelection.from_lists(torch.zeros(40, dtype=torch.int64), blocks, torch.tensor([[[33, 0, 1, -1]]]))
    packed = PackedSelection.pack(selection, torch.device("cpu"))
    assert packed.bits.tolist() == [[[0b11, 0b10]]]
    assert packed.most == 3


def test_numbers_stand_for_the_same_bits() -> None:
    """The last bit of a word, which is the sign of an integer, and lists that are shorter than others."""
    blocks, query_block = BlockPartition.blocks(Rows.packed([70]), 1), torch.arange(70) % 2
    numbers = torch.tensor(
        [[[0, 31, 63, 69], [-1] * 4, [5, -1, -1, -1]], [[64, 69, -1, -1], [31, 32, -1, -1], [-1] * 4]]
    )
    selection = BlockSelection.from_lists(query_block, blocks, numbers.transpose(0, 1))
    wanted = PackedSelection.pack(selection, torch.device("cpu"))
    for dtype in (torch.int16, torch.int32):
        found = replace(wanted, stored=numbers.to(dtype), numbered=True)
        assert torch.equal(found.bits, wanted.bits)
        assert (found.heads, found.num_query_blocks) == (3, 2)
        assert torch.equal(found.as_lists.key_blocks, selection.key_blocks)
        assert torch.equal(found.selected_blocks(), selection.selected_blocks())


def test_numbers_are_kept_where_they_take_a_quarter_of_the_bits() -> None:
    """2 bytes each; 4 beyond 32,768 blocks, whose numbers int16 cannot hold."""
    assert [numbers_pay(blocks, 32) for blocks in (2016, 2017, 1 << 15)] == [False, True, True]
    assert [number_dtype(blocks) for blocks in (1 << 15, (1 << 15) + 1)] == [torch.int16, torch.int32]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 70])
def test_packed_lists_come_back(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_selection, "QUERY_BLOCKS_AT_ONCE", 4)
    rows = Rows.packed([count])
    blocks, query_block = BlockPartition.blocks(rows, 1), torch.arange(count) % 9
    mask = torch.rand(3, 9, count, generator=torch.Generator().manual_seed(count)) < 0.3
    mask[0, 0], mask[1, 1], mask[2, 2] = True, False, torch.arange(count) == count - 1
    selection = BlockSelection.from_lists(query_block, blocks, torch.where(mask, torch.arange(count), -1))
    packed = PackedSelection.pack(selection, torch.device("cpu"))
    assert packed.most == count
    # The lists that it was packed from, which stay at hand, and those of its bits.
    for found in (packed.as_lists, replace(packed).as_lists):
        assert torch.equal(found.offsets, selection.offsets)
        assert torch.equal(found.key_blocks, selection.key_blocks)
    assert torch.equal(packed.mask(rows), mask[:, query_block])
    # Of some queries and of padding: what others select does not count.
    some = torch.tensor([0, -1, min(4, count - 1)])
    of_selection = selection.of_queries(some)
    of_some = replace(packed, query_block=of_selection.query_block), of_selection
    for of in ((packed, selection), of_some):
        assert torch.equal(of[0].selected_blocks(), of[1].selected_blocks())
    wanted = mask[:, query_block[some[some >= 0]]].any(dim=1)
    assert torch.equal(of_some[0].selected_blocks(), torch.nn.functional.pad(wanted, (0, 1)))


def test_nothing_to_select_from() -> None:
    blocks = BlockPartition.blocks(Rows.packed([], padding=2), 4)
    nothing = torch.full((2,), -1)
    selection = BlockSelection.from_lists(nothing, blocks, torch.zeros(2, 0, 0))
    packed = PackedSelection.pack(selection, torch.device("cpu"))
    assert packed.bits.shape == (0, 2, 1)
    assert packed.most == 0
    assert packed.as_lists.offsets.tolist() == [0]
    assert packed.selected_blocks().tolist() == [[False], [False]]

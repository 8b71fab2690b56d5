"""Block-sparse patterns: a given mask is what it says, a drawn one has the density asked for."""

import pytest
import torch

from farspan.kernels.kinds.routed import LocalShard
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.planner import Heads, HeadShare
from farspan.kernels.sequence_attention import SequencePlanner
from tests.support.sequence_shards import lists, select


def drawn(mechanism: BlockSparse, rows: Rows, heads: int = 2) -> BlockSelection:
    x = torch.zeros(len(rows), heads, 8)
    return select(mechanism, x, x, rows)


def test_a_given_mask_is_followed_in_every_document() -> None:
    rows, mechanism = Rows.packed([40, 25]), BlockSparse(block=10, mask=("1", "11", "101", "0111"))
    # Documents of 4 and 3 blocks, numbered from 0 and from 4.
    expected = [[0], [0, 1], [0, 2], [1, 2, 3], [4], [4, 5], [4, 6]]
    assert list(lists(drawn(mechanism, rows, 1)).values()) == expected


def test_later_blocks_are_left_out_where_attention_is_causal() -> None:
    rows, mask = Rows.packed([30]), ("111", "111", "111")
    assert list(lists(drawn(BlockSparse(block=10, mask=mask), rows, 1)).values()) == [[0], [0, 1], [0, 1, 2]]
    both = lists(drawn(BlockSparse(block=10, mask=mask, causal=False), rows, 1))
    assert list(both.values()) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.25, 1.0])
def test_the_density_of_a_drawn_pattern(density: float, causal: bool) -> None:
    rows = Rows.packed([16 * 100, 16 * 3])
    chosen = lists(drawn(BlockSparse(block=16, density=density, causal=causal), rows))
    for (_, tile), blocks in chosen.items():
        first, last = (0, 99) if tile < 100 else (100, 102)
        seen = (tile if causal else last) - first + 1
        assert len(blocks) == max(round(seen * density), 1)
        assert tile in blocks
        assert blocks == sorted(set(blocks))
        assert min(blocks) >= first
        assert max(blocks) <= (tile if causal else last)


def test_a_drawn_pattern_differs_between_heads_and_seeds_and_covers_all_blocks() -> None:
    rows = Rows.packed([16 * 200])
    one, other = (lists(drawn(BlockSparse(block=16, density=0.1, seed=seed), rows)) for seed in (0, 1))
    assert one == lists(drawn(BlockSparse(block=16, density=0.1, seed=0), rows))
    assert one[0, 150] != one[1, 150]
    assert one[0, 150] != other[0, 150]
    visits = torch.tensor([block for (_, tile), blocks in one.items() for block in blocks if block != tile]).bincount()
    # Of 2 x 199 tiles a tenth each, over fewer tiles toward the end.
    assert visits[:100].min() > 5
    assert visits[:50].float().std() < 12


@pytest.mark.parametrize("mechanism", BlockSparse.examples(), ids=str)
def test_a_pattern_is_planned_once_for_all_layers_of_a_sequence(mechanism: BlockSparse) -> None:
    rows, heads = Rows.packed([100, 70], padding=3), Heads(query=4, kv=2)
    routing = mechanism.key_routing(SequencePlanner.of(rows, HeadShare.all(heads), backend="reference"))
    assert isinstance(routing, LocalShard)
    (q, k), (q_of_next, k_of_next) = ((torch.randn(173, n, 16) for n in (4, 2)) for _ in range(2))
    selection, packed = mechanism.select(q, k, routing), mechanism.select_packed(q, k, routing)
    assert mechanism.select(q_of_next, k_of_next, routing) is selection
    assert mechanism.select_packed(q_of_next, k_of_next, routing) is packed
    assert torch.equal(packed.as_lists.key_blocks, selection.key_blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block=0 must be at least 1"),
        ({"density": 0.0}, "density=0.0 must be above 0"),
        ({"mask": ("1", "1x")}, "mask\\[1\\]='1x' must be made of 0 and 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparse(**options)


def test_a_mask_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="mask has 2 tiles, but a document has 3"):
        drawn(BlockSparse(block=10, mask=("1", "1")), Rows.packed([30]))

import pytest
import torch

from farspan.kernels.masks.attention_mask import MAX_WINDOW, AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.triton_kernels.mask_terms import BITS, KeyRanks, pack

KEYS = Rows.packed([50, 1, 30], padding=3).take(torch.randperm(84, generator=torch.Generator().manual_seed(0)))
ATTENTION_MASKS = [
    AttentionMask(),
    AttentionMask(causal=False),
    AttentionMask(window=7, sinks=3),
    AttentionMask(window=1),
    AttentionMask(causal=False, window=9, sinks=2),
    AttentionMask(causal=False, window=MAX_WINDOW),
]


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("queries", [KEYS, Rows.packed([60, 4]), Rows.packed([]), Rows.packed([], padding=2)])
def test_two_intervals_of_ranks_are_the_mask(queries: Rows, attention_mask: AttentionMask) -> None:
    for keys in (KEYS, KEYS.take(torch.arange(5, 40)), Rows.packed([])):
        ranks = KeyRanks.of(keys)
        first, last = ranks.near(queries, attention_mask)
        mask = (first[:, None] <= ranks.rank) & (ranks.rank <= last[:, None])
        if attention_mask.sinks:
            first, last = ranks.sinks(queries, attention_mask)
            mask |= (first[:, None] <= ranks.rank) & (ranks.rank <= last[:, None])
        assert torch.equal(mask, attention_mask.mask(queries, keys))


def test_padding_has_no_rank() -> None:
    ranks = KeyRanks.of(KEYS)
    assert (ranks.rank[KEYS.document < 0] == -1).all()
    assert sorted(ranks.rank.tolist()) == [-1] * 3 + list(range(81))


GRIDS = [
    (Dimension(length=7, window=3),),
    (Dimension(length=64, window=9, stride=4, causal=True),),
    (Dimension(length=5, window=3), Dimension(length=8, window=4, stride=2)),
    (
        Dimension(length=3, window=2, causal=True),
        Dimension(length=5, window=2, dilation=2),
        Dimension(length=8, window=3),
    ),
    (Dimension(length=1, window=1), Dimension(length=16, window=5)),
]


@pytest.mark.parametrize("dimensions", GRIDS, ids=str)
def test_one_comparison_covers_all_dimensions(dimensions: tuple[Dimension, ...]) -> None:
    neighborhood = Neighborhood(dimensions=dimensions)
    queries, keys = Rows.packed([neighborhood.tokens * 2 + 1]), Rows.packed([neighborhood.tokens + 3])
    packed = {name: torch.as_tensor(column) for name, column in pack(neighborhood, queries, keys).items()}
    guards = packed["guards"]
    above = (packed["k_coordinates"] | guards) - packed["q_low"][:, None]
    below = packed["q_high"][:, None] - packed["k_coordinates"]
    mask = (above & below & guards) == guards
    if "q_class" in packed:
        mask &= packed["q_class"][:, None] == packed["k_class"]
    assert torch.equal(mask, neighborhood.mask_mod(queries.position[:, None], keys.position[None, :]))


def test_one_grid_without_dilation_needs_no_class() -> None:
    rows = Rows.packed([40])
    assert "q_class" not in pack(Neighborhood(dimensions=GRIDS[2]), rows, rows)


def test_all_bits_can_be_used_but_no_more() -> None:
    rows = Rows.packed([4])
    widest = Neighborhood(dimensions=(Dimension(length=1 << (BITS - 1), window=3),))
    assert pack(widest, rows, rows)["guards"] == 1 << (BITS - 1)
    wider = Neighborhood(dimensions=(Dimension(length=(1 << 20) + 1, window=3), Dimension(length=1 << 10, window=3)))
    with pytest.raises(ValueError, match="takes 33 bits, more than 31"):
        pack(wider, rows, rows)

import pytest
import torch

from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.triton_kernels.packed_coordinates import BITS, pack

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

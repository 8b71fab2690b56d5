"""The rates of MiniMax-01 by its published formula and by a second one, the slopes of ALiBi, on which it rests."""

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.trainer.toml_config import from_tree


@pytest.mark.parametrize("layers", [1, 2, 4, 80])
@pytest.mark.parametrize("heads", [1, 2, 7, 8, 12, 64])
def test_rates_are_a_geometric_series_that_falls_with_the_layer(heads: int, layers: int) -> None:
    for layer in {0, layers // 2, layers - 1}:
        factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        slope, slopes = 1.0, []
        for _ in range(heads):
            slope /= 256 ** (1 / heads)
            slopes.append(slope * factor)
        got = Lightning(layer=layer, layers=layers).decay(heads)
        assert got.dtype == torch.float64
        assert torch.allclose(got, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12)


def test_rates_written_out() -> None:
    """8 heads: 1/2 to 1/256. The last layer still forgets, a hundred-thousandth as fast as the first, or so."""
    assert torch.allclose(
        Lightning(layer=0, layers=80).decay(8), torch.tensor([2.0**-i for i in range(1, 9)]).double() * 1.00001
    )
    last = Lightning(layer=79, layers=80).decay(8)
    assert torch.allclose(last, torch.tensor([2.0**-i for i in range(1, 9)]).double() * (1e-5 + 1e-5 / 79), rtol=1e-6)


@pytest.mark.parametrize("options", [{"layer": 4, "layers": 4}, {"layer": -1}, {"layers": 0}])
def test_a_layer_that_is_not_there_is_refused(options: dict) -> None:
    with pytest.raises((ValueError, ConfigError), match="layer"):
        from_tree(MECHANISMS.get("lightning"), options)


def test_useful_work_is_that_of_the_recurrence() -> None:
    """A token adds k v^T to the state and reads q S: D Dv multiply-adds each. Padding is of no use."""
    rows = Rows.packed([5, 3], padding=4)
    assert Lightning().useful_flops(rows, 16, 8) == 8 * 2 * (2 * 16 * 8)
    assert Lightning().unmasked_pairs(rows) == 8
    dense = MECHANISMS.get("dense")()
    assert dense.useful_flops(rows, 16, 8) == (15 + 6) * (2 * 16 + 2 * 8)

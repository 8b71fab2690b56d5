import pytest
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.trainer.toml_config import from_tree


def seen(mechanism: Neighborhood, position: int, tokens: int) -> list[int]:
    rows = Rows.packed([tokens])
    return mechanism.attention_mask().mask(rows, rows)[position].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("options", "position", "expected"),
    [
        ({"window": (3,)}, 4, [3, 4, 5]),
        ({"window": (3,)}, 0, [0, 1, 2]),
        ({"window": (3,)}, 9, [7, 8, 9]),
        ({"window": (4,)}, 5, [3, 4, 5, 6]),
        ({"window": (4,)}, 9, [6, 7, 8, 9]),
        ({"window": (3,), "causal": (True,)}, 5, [3, 4, 5]),
        ({"window": (3,), "causal": (True,)}, 1, [0, 1]),
        ({"window": (3,), "dilation": (2,)}, 5, [3, 5, 7]),
        ({"window": (3,), "dilation": (3,)}, 8, [2, 5, 8]),
        ({"window": (4,), "stride": (2,)}, 4, [3, 4, 5, 6]),
        ({"window": (4,), "stride": (2,)}, 5, [3, 4, 5, 6]),
        ({"window": (5,), "stride": (5,)}, 7, [5, 6, 7, 8, 9]),
        ({"window": (4,), "stride": (2,), "causal": (True,)}, 6, [4, 5, 6]),
        ({"window": (4,), "stride": (2,), "causal": (True,)}, 7, [4, 5, 6, 7]),
    ],
)
def test_one_dimension_by_hand(options: dict, position: int, expected: list[int]) -> None:
    assert seen(Neighborhood(grid=(10,), **options), position, 10) == expected


def test_two_dimensions_by_hand() -> None:
    """A grid of 4 x 5; the query in row 0, column 2 sees rows 0 to 2 and columns 1 to 3."""
    mechanism = Neighborhood(grid=(4, 5), window=(3, 3))
    assert seen(mechanism, 2, 20) == [1, 2, 3, 6, 7, 8, 11, 12, 13]


def test_grids_of_one_document_do_not_see_each_other() -> None:
    mechanism = Neighborhood(grid=(2, 3), window=(2, 3))
    rows = Rows.packed([12])
    assert torch.equal(mechanism.attention_mask().mask(rows, rows), torch.block_diag(*[torch.ones(6, 6)] * 2).bool())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": [8], "window": [3, 3]}, r"window=\[3, 3\] must have one value per dimension of grid=\[8\]"),
        ({"grid": [8], "window": [9]}, "window=9 x dilation=1 must fit into grid length=8"),
        ({"grid": [8], "window": [3], "stride": [4]}, "stride=4 must be from 1 to window=3"),
        ({"grid": [], "window": []}, "at least one dimension"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_tree(MECHANISMS.get("neighborhood"), options).attention_mask()  # pyright: ignore[reportAttributeAccessIssue]

import pytest
import torch

from farspan.kernels.masks.rows import PADDING, Rows


def test_packed_documents() -> None:
    rows = Rows.packed([2, 0, 3], padding=2)
    assert rows.position.tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert rows.document.tolist() == [0, 0, 2, 2, 2, PADDING, PADDING]


def test_take_keeps_rows_together_and_makes_padding_of_minus_one() -> None:
    rows = Rows.packed([2, 3]).take(torch.tensor([4, -1, 0]))
    assert rows.position.tolist() == [2, 0, 0]
    assert rows.document.tolist() == [1, PADDING, 0]
    assert Rows.packed([]).take(torch.tensor([-1, -1])).document.tolist() == [PADDING, PADDING]


@pytest.mark.parametrize(
    ("position", "document", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), "Rows.position must be int32"),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), "3 rows but Rows.document has 2"),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int32), "Rows.document must be int32"),
    ],
)
def test_bad_columns_are_refused(position: torch.Tensor, document: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(position=position, document=document)

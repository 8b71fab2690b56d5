import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds.token_choice import ChosenTokens
from farspan.kernels.layers.key_convolution import earlier_rows
from farspan.kernels.lifetimes.lifetimes import DocumentOrder
from farspan.kernels.linear_attention.state import order
from farspan.kernels.masks.rows import PADDING, Rows
from farspan.kernels.triton_kernels.mask_terms import KeyRanks


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


LARGEST = (1 << 31) - 1
FAR = [
    (document, position) for document in (0, 1, 2, LARGEST - 1, LARGEST) for position in (0, 1, LARGEST - 1, LARGEST)
]
"""Documents and positions around the ends of int32, in order."""
SHUFFLED = torch.randperm(len(FAR) + 2, generator=torch.Generator().manual_seed(0))


def far_rows() -> Rows:
    """Those in any order, with padding of the largest position among them."""
    document, position = torch.tensor([*FAR, (PADDING, LARGEST), (-LARGEST, 0)], dtype=torch.int32)[SHUFFLED].t()
    return Rows(position=position.contiguous(), document=document.contiguous())


def tokens_of(index: Tensor, rows: Rows) -> list[tuple[int, int]]:
    """Document and position of the rows at `index` that are not padding."""
    pairs = zip(rows.document[index].tolist(), rows.position[index].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] >= 0]


def test_whatever_sorts_rows_knows_all_documents_and_positions() -> None:
    """An order is one number of both; no position is so far out that it passes for the next document."""
    rows = far_rows()
    assert tokens_of(rows.ordinal().argsort(), rows) == FAR
    assert tokens_of(order(rows), rows) == FAR
    assert (rows.document[order(rows)[-2:]] < 0).all()
    assert tokens_of(DocumentOrder.of(rows).index, rows) == FAR
    assert tokens_of(KeyRanks.of(rows).rank.argsort(stable=True), rows) == FAR
    chosen = ChosenTokens.of((rows.document >= 0)[:, None], rows)
    assert tokens_of(chosen.token, rows) == FAR
    assert chosen.rows.position.tolist() == [0, 1, 2, 3] * 5


def test_the_row_before_the_first_position_is_none_of_another_document() -> None:
    rows = far_rows()
    (before,) = earlier_rows(rows, rows, 1)
    for row, found in enumerate(before.tolist()):
        document, position = int(rows.document[row]), int(rows.position[row])
        expected = (document, position - 1) if document >= 0 else None
        assert tokens_of(torch.tensor([found]), rows) == [expected] if expected in FAR else found == -1

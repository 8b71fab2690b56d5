import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.window import Window


def test_a_window_and_its_sinks_by_hand() -> None:
    rows = Rows.packed([6, 3])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0, 0],
            [1, 0, 1, 1, 0, 0, 0, 0, 0],
            [1, 0, 0, 1, 1, 0, 0, 0, 0],
            [1, 0, 0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 1, 1, 1],
        ]
    )
    assert torch.equal(Window(window=2, sinks=1).attention_mask().mask(rows, rows).int(), expected.int())

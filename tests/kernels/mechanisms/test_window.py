from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.window import Window


def test_a_window_and_its_sinks_by_hand() -> None:
    rows = Rows.packed([6, 3])
    seen = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5], [6], [6, 7], [6, 7, 8]]
    mask = Window(window=2, sinks=1).attention_mask().mask(rows, rows)
    assert [row.nonzero().flatten().tolist() for row in mask] == seen

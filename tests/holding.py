"""What a routed mechanism chooses for a whole sequence, or for the rows of one holder of several."""

from torch import Tensor

from farspan.kernels.mechanism import Heads, Holding, Routed, Total
from farspan.kernels.rows import Rows
from farspan.kernels.selection import Selection
from farspan.kernels.whole import alone


def select(
    mechanism: Routed, q: Tensor, k: Tensor, rows: Rows, everyone: Rows | None = None, total: Total = alone
) -> Selection:
    """Return the choice for q `[T, Hq, D]` of the held rows; `everyone` is the whole sequence, `rows` if left out."""
    holding = Holding(
        mechanism=mechanism,
        rows=rows,
        everyone=rows if everyone is None else everyone,
        heads=range(q.shape[1]),
        all_heads=Heads(query=q.shape[1], kv=k.shape[1]),
        total=total,
    )
    return mechanism.select(q, k, holding)


def lists(selection: Selection) -> dict[tuple[int, int], list[int]]:
    """Return the blocks of each (head, unit)."""
    offsets, chosen = selection.offsets.tolist(), selection.chosen.tolist()
    return {
        (head, unit): chosen[
            offsets[head * selection.num_units + unit] : offsets[head * selection.num_units + unit + 1]
        ]
        for head in range(selection.heads)
        for unit in set(selection.unit.tolist()) - {-1}
    }

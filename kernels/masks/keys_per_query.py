"""How many keys each query of a whole sequence sees: the work of a token, in closed form, without a plan."""

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows


def count_keys_per_query(attention_mask: AttentionMask, global_rows: Rows) -> Tensor:
    """Return the keys that each row sees, the mean over heads, float64 `[tokens]`; 0 for padding.

    The rows hold all positions of their documents.
    """
    if isinstance(attention_mask.window, tuple):
        uniform = attention_mask.by_heads(len(attention_mask.window))
        weighted = [count_keys_per_query(one, global_rows) * len(heads) for one, heads in uniform.items()]
        return torch.stack(weighted).sum(dim=0) / len(attention_mask.window)
    real = global_rows.document >= 0
    position = global_rows.position.double()
    # Documents have ids of their own: the last position of one is that of its rows, wherever these are.
    ids = global_rows.document.clamp(min=0).long()
    lengths = torch.bincount(ids, weights=real.double())
    last = lengths[ids] - 1
    if attention_mask.neighborhood is not None:
        seen = _in_neighborhood(attention_mask.neighborhood)[
            global_rows.position.long() % attention_mask.neighborhood.tokens
        ]
        return seen.masked_fill_(~real, 0)
    high = position if attention_mask.causal else last
    seen = high + 1
    if attention_mask.window is not None:
        low = (position - attention_mask.window + 1).clamp(min=0)
        high = torch.minimum(high, position + attention_mask.window - 1)
        seen = high - low + 1 + low.clamp(max=attention_mask.sinks)
        if not attention_mask.causal:
            seen += (last.clamp(max=attention_mask.sinks - 1) - high).clamp(min=0)
    return seen.masked_fill_(~real, 0)


def _in_neighborhood(neighborhood: Neighborhood) -> Tensor:
    """Return the cells that each cell of the grid sees, float64 `[cells]`; documents are taken to fill their grids."""
    table = torch.ones(1, dtype=torch.float64)
    for dimension in neighborhood.dimensions:
        table = (table[:, None] * _in_dimension(dimension)).flatten()
    return table


def _in_dimension(dimension: Dimension) -> Tensor:
    low, high = dimension.interval(torch.arange(dimension.length))
    return ((high - low) // dimension.dilation + 1).clamp(min=0).double()

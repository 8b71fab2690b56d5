"""How many keys each query of a whole sequence sees: the work of a token, in closed form, without a plan."""

import torch
from torch import Tensor

from farspan.kernels.masks.mask import Visibility
from farspan.kernels.masks.neighborhood import Dimension, Neighbourhood
from farspan.kernels.masks.rows import Rows


def count_visible(visibility: Visibility, everyone: Rows) -> Tensor:
    """Return the keys that each row sees, the mean over heads, float64 `[tokens]`; 0 for padding.

    The rows hold all positions of their documents.
    """
    if isinstance(visibility.window, tuple):
        uniform = visibility.by_heads(len(visibility.window))
        weighted = [count_visible(one, everyone) * len(heads) for one, heads in uniform.items()]
        return torch.stack(weighted).sum(dim=0) / len(visibility.window)
    real = everyone.document >= 0
    position = everyone.position.double()
    # Documents have ids of their own: the last position of one is that of its rows, wherever these are.
    ids = everyone.document.clamp(min=0).long()
    lengths = torch.bincount(ids, weights=real.double())
    last = lengths[ids] - 1
    if visibility.neighbourhood is not None:
        seen = _in_neighbourhood(visibility.neighbourhood)[everyone.position.long() % visibility.neighbourhood.tokens]
        return seen.masked_fill_(~real, 0)
    high = position if visibility.causal else last
    seen = high + 1
    if visibility.window is not None:
        low = (position - visibility.window + 1).clamp(min=0)
        high = torch.minimum(high, position + visibility.window - 1)
        seen = high - low + 1 + low.clamp(max=visibility.sinks)
        if not visibility.causal:
            seen += (last.clamp(max=visibility.sinks - 1) - high).clamp(min=0)
    return seen.masked_fill_(~real, 0)


def _in_neighbourhood(neighbourhood: Neighbourhood) -> Tensor:
    """Return the cells that each cell of the grid sees, float64 `[cells]`; documents are taken to fill their grids."""
    table = torch.ones(1, dtype=torch.float64)
    for dimension in neighbourhood.dimensions:
        table = (table[:, None] * _in_dimension(dimension)).flatten()
    return table


def _in_dimension(dimension: Dimension) -> Tensor:
    low, high = dimension.interval(torch.arange(dimension.length))
    return ((high - low) // dimension.dilation + 1).clamp(min=0).double()

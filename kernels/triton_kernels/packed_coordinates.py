"""Coordinates of a grid packed into one number, so that all dimensions are compared at once.

Example: a grid of 4 x 8 takes fields of 2 and 3 bits, each below a guard bit G: `G yy G xxx`. The query at (2, 5) with
a window of 3 in both directions has low (1, 4) and high (3, 6), and the key at (2, 7):

    key with guards set - low     1 10 1 111 - 0 01 0 100 = 1 01 1 011    both guards survive: not below low
    high with guards set - key    1 11 1 110 - 0 10 0 111 = 1 01 0 111    the guard of x is gone: 7 > 6, masked
"""

import torch
from torch import Tensor

from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import Rows

BITS = 31
"""Bits of a packed number: int32 without its sign."""


def pack(neighborhood: Neighborhood, queries: Rows, keys: Rows) -> dict[str, Tensor | int]:
    """Return a neighborhood as packed int32 columns: a key is in it if no field of key - low or high - key borrows.

    q_low, q_high `[queries]`, k_coordinates `[keys]`: each coordinate below a guard bit that is set in q_high only.
    guards: all guard bits. q_class, k_class, if there are several grids or dilation: the grid and the residue of
    dilation, equal where a query may attend to a key. Raises ValueError for a grid that takes more than 31 bits.
    """
    dimensions = neighborhood.dimensions
    widths = [(dimension.length - 1).bit_length() for dimension in dimensions]
    if sum(widths) + len(widths) > BITS:
        raise ValueError(
            f"a grid of {[dimension.length for dimension in dimensions]} takes {sum(widths) + len(widths)} bits, "
            f"more than {BITS}: attention.backend='reference' has no such limit"
        )
    (q_class, *lows), (_, *highs) = neighborhood.intervals(queries.position)
    k_class, *coordinates = neighborhood.coordinates(keys.position)
    columns = {"q_low": lows, "q_high": highs, "k_coordinates": coordinates}
    packed = {name: torch.zeros_like(x[0]) for name, x in columns.items()}
    guards = 0
    several = bool((q_class > 0).any() or (k_class > 0).any())
    for n, (dimension, width) in enumerate(zip(dimensions, widths, strict=True)):
        for name, x in columns.items():
            packed[name] = packed[name] << (width + 1) | x[n]
        guards = guards << (width + 1) | 1 << width
        # Keys of a window are `dilation` apart, so they have the same residue.
        q_class = q_class * dimension.dilation + lows[n] % dimension.dilation
        k_class = k_class * dimension.dilation + coordinates[n] % dimension.dilation
        several |= dimension.dilation > 1
    packed["q_high"] |= guards
    return {**packed, "guards": guards, **({"q_class": q_class, "k_class": k_class} if several else {})}

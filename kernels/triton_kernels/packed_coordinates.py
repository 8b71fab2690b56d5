"""Packing: the coordinates of a grid in one number, so that all dimensions are compared at once."""

import torch
from torch import Tensor

from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import Rows

BITS = 31
"""Bits of a packed number: int32 without its sign."""


def pack(neighborhood: Neighborhood, queries: Rows, keys: Rows) -> dict[str, Tensor | int]:
    """Return a neighborhood as packed int32 columns: a key is in it iff no field of place - low, high - place borrows.

    q_low, q_high `[queries]`, k_place `[keys]`: coordinates, each with a guard bit above it that is set in q_high only.
    guards: all guard bits. q_class, k_class, if there are several grids or dilation: the grid and the residue of
    dilation, equal where a key may be seen. Raises ValueError for a grid that takes more than 31 bits.
    """
    dimensions = neighborhood.dimensions
    widths = [(dimension.length - 1).bit_length() for dimension in dimensions]
    if sum(widths) + len(widths) > BITS:
        raise ValueError(
            f"a grid of {[dimension.length for dimension in dimensions]} takes {sum(widths) + len(widths)} bits, "
            f"more than {BITS}: attention.backend='reference' has no such limit"
        )
    (q_class, *lows), (_, *highs) = neighborhood.intervals(queries.position)
    k_class, *places = neighborhood.coordinates(keys.position)
    packed = {name: torch.zeros_like(x[0]) for name, x in (("q_low", lows), ("q_high", highs), ("k_place", places))}
    guards = 0
    several = bool((q_class > 0).any() or (k_class > 0).any())
    for n, (dimension, width) in enumerate(zip(dimensions, widths, strict=True)):
        for name, coordinates in (("q_low", lows), ("q_high", highs), ("k_place", places)):
            packed[name] = packed[name] << (width + 1) | coordinates[n]
        guards = guards << (width + 1) | 1 << width
        # Keys of a window are `dilation` apart: they are those of the same residue.
        q_class = q_class * dimension.dilation + lows[n] % dimension.dilation
        k_class = k_class * dimension.dilation + places[n] % dimension.dilation
        several |= dimension.dilation > 1
    packed["q_high"] |= guards
    return {**packed, "guards": guards, **({"q_class": q_class, "k_class": k_class} if several else {})}

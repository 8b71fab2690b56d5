"""Neighborhood attention on a 1-, 2- or 3-dimensional grid, with stride, dilation and causal dimensions.

NATTEN (arXiv 2204.07143, 2209.15001) and generalized neighborhood attention (arXiv 2504.16922); rules: see
`farspan.kernels.masks.neighborhood`. Tokens of a document are the cells of the grid in row-major order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension
from farspan.kernels.masks.neighborhood import Neighborhood as Grid
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Neighborhood(Masked):
    """Each option has one value per dimension of the grid; stride, dilation and causal may be left empty."""

    grid: tuple[int, ...]
    """Lengths of the grid."""
    window: tuple[int, ...]
    """Keys that a query attends to."""
    stride: tuple[int, ...] = ()
    """Neighboring queries that share a window; 1 if empty."""
    dilation: tuple[int, ...] = ()
    """Distance between the keys of a window; 1 if empty."""
    causal: tuple[bool, ...] = ()
    """Whether later keys are hidden; false if empty."""

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation", "causal"):
            values = getattr(self, name)
            if len(values) != len(self.grid) and (values or name == "window"):
                raise ValueError(f"{name}={list(values)} must have one value per dimension of grid={list(self.grid)}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(grid=(160,), window=(21,), stride=(4,), causal=(True,)),
            cls(grid=(3, 5, 8), window=(2, 3, 3), stride=(1, 1, 2), dilation=(1, 1, 2), causal=(True, False, False)),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"neighborhood_8x32x32": cls(grid=(8, 32, 32), window=(4, 16, 16), stride=(1, 8, 8))}

    def attention_mask(self) -> AttentionMask:
        count = len(self.grid)
        # One column per option, one row per dimension.
        stride, dilation = self.stride or (1,) * count, self.dilation or (1,) * count
        columns = self.grid, self.window, stride, dilation, self.causal or (False,) * count
        dimensions = tuple(
            Dimension(length=length, window=window, stride=stride, dilation=dilation, causal=causal)
            for length, window, stride, dilation, causal in zip(*columns, strict=True)
        )
        return AttentionMask(causal=False, neighborhood=Grid(dimensions=dimensions))


MECHANISMS.add("neighborhood", Neighborhood)

"""Products of rows, sorted by expert, with matrices of their expert: what a device computes them with.

A way to compute them is a module with `linear`, `linear_backward`, `swiglu` and `swiglu_backward`.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from farspan.kernels.moe import grouped_loop


def products_of(x: Tensor) -> ModuleType:
    """Return what computes products of these rows: Triton's kernels on a GPU, else a loop over experts.

    No kernel multiplies float64, which checks use, and which is a loop everywhere.
    """
    if not on_gpu(x) or x.dtype == torch.float64:
        return grouped_loop
    # Triton is there wherever torch has CUDA, and need not be elsewhere.
    from farspan.kernels.triton_kernels import grouped_launch as grouped

    return grouped


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are launched for x; tests let an interpreter run them."""
    return x.is_cuda


def check(x: Tensor, counts: Sequence[int], shapes: dict[str, tuple[Tensor, tuple[int, int]]]) -> None:
    """Raise ValueError unless counts are those of rows `[rows, in]` and of each weight `[E, *shape]`, by its name.

    A kernel would read past the end of what is too small.
    """
    experts = len(next(iter(shapes.values()))[0])
    if len(counts) != experts or sum(counts) != len(x):
        raise ValueError(f"{len(counts)} experts with {sum(counts)} rows in all, but {experts} and {len(x)} are here")
    if min(counts, default=0) < 0:
        raise ValueError(f"an expert has 0 rows or more; got counts {list(counts)}")
    for name, (weight, shape) in shapes.items():
        if weight.shape != (experts, *shape):
            raise ValueError(f"{name} {list(weight.shape)} does not fit rows {list(x.shape)}: {[experts, *shape]} does")
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} is {weight.dtype}, and its rows are {x.dtype}")

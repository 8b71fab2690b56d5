"""SwiGLU by many experts: rows sorted by expert, the rows of each multiplied by its own matrices.

Legend: N rows, C width, F inner size, E experts.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.moe import grouped_loop


def grouped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)) `[N, C]` of x `[N, C]`; expert e has the next counts[e] rows.

    gate, up `[E, F, C]`, down `[E, C, F]`, of x's dtype. counts: int64 `[E]`, on the device of x, any of them 0; rows
    after those of the last expert have none, and give 0. Of the rows only x is saved: gate and up are computed again in
    the backward pass. Raises ValueError when shapes or dtypes do not fit, and on a CPU when counts do not: a device is
    not asked.
    """
    # A kernel would read past the end of a tensor that is too small.
    experts, inner, width = len(gate), gate.shape[-2], x.shape[-1]
    if counts.shape != (experts,) or counts.dtype != torch.int64:
        raise ValueError(f"counts must be int64 [{experts}], not {counts.dtype} {list(counts.shape)}")
    if counts.device.type == "cpu" and (bool((counts < 0).any()) or int(counts.sum()) > len(x)):
        raise ValueError(f"experts have 0 rows or more, of {len(x)} in all; got counts {counts.tolist()}")
    fitting = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for weight, (name, shape) in zip((gate, up, down), fitting.items(), strict=True):
        if weight.shape != (experts, *shape):
            raise ValueError(f"{name} {list(weight.shape)} does not fit rows {list(x.shape)}: {[experts, *shape]} does")
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} is {weight.dtype}, and its rows are {x.dtype}")
    return _GroupedSwiglu.apply(x, gate, up, down, counts)  # pyright: ignore[reportReturnType]


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down, counts)
        return _products_of(x).swiglu(x, gate, up, down, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights_and_counts = ctx.saved_tensors
        return *_products_of(x).swiglu_backward(x, *weights_and_counts, dout), None


def _products_of(x: Tensor) -> ModuleType:
    """Return the module, with `swiglu` and `swiglu_backward`, for these rows: Triton's on a GPU, else a loop."""
    if not on_gpu(x):
        return grouped_loop
    # Triton is installed wherever torch has CUDA, and need not be elsewhere.
    from farspan.kernels.triton_kernels import grouped_launch

    return grouped_launch


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are launched for x; tests let an interpreter run them."""
    # No kernel multiplies float64, which is for checks.
    return x.is_cuda and x.dtype != torch.float64

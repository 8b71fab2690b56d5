"""Products of rows with matrices of their experts: what is measured, beside what, and whether it is right.

Legend: N rows, C width, F inner size, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_linear import grouped_linear
from farspan.kernels.moe.grouped_swiglu import grouped_swiglu
from farspan.tools.bench.case import Attention
from farspan.tools.bench.check import TOLERANCE, Verdict, excess, outcome

aten = torch.ops.aten

SWIGLU, LINEAR = "swiglu", "linear"
PRODUCTS = {LINEAR: {"fwd": 1, "bwd": 2, "fwd_bwd": 3}, SWIGLU: {"fwd": 3, "bwd": 8, "fwd_bwd": 11}}
"""Products of N x C x F by direction; of a SwiGLU's backward pass, two are gate and up computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How many rows each expert has, of how wide rows and matrices."""

    name: str
    counts: tuple[int, ...]
    width: int
    inner: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def inputs(self, kind: str, *, experts: int | None = None) -> list[Tensor]:
        """Return normal rows and matrices of so many experts, of all if not given; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        count, (wide, inner) = experts or len(self.counts), (self.width, self.inner)
        shapes = [(self.rows, wide), *[(count, inner, wide)] * (1 if kind == LINEAR else 2)]
        shapes += [] if kind == LINEAR else [(count, wide, inner)]
        drawn = [torch.randn(shape, generator=generator, device=self.device) for shape in shapes]
        scales = [1.0, *(shape[-1] ** -0.5 for shape in shapes[1:])]
        return [x.mul_(scale).to(self.dtype).requires_grad_() for x, scale in zip(drawn, scales, strict=True)]

    def gradient(self, kind: str) -> Tensor:
        """Return a normal gradient of the result."""
        generator = torch.Generator(self.device).manual_seed(1)
        width = self.inner if kind == LINEAR else self.width
        return torch.randn(self.rows, width, generator=generator, device=self.device).to(self.dtype)


def even_counts(experts: int, rows: int) -> tuple[int, ...]:
    """Return as many rows for each expert, one more for the first ones if need be."""
    return tuple(rows // experts + (expert < rows % experts) for expert in range(experts))


def skewed_counts(experts: int, rows: int) -> tuple[int, ...]:
    """Return rows in proportion to 1, 1/2, 1/3, ... and none for a tenth of the experts, in a shuffled order."""
    shares = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    shares[experts - experts // 10 :] = 0
    counts = (shares / shares.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return tuple(counts[torch.randperm(experts, generator=torch.Generator().manual_seed(0))].tolist())


MULTIPLE = {"cpu": 1, "cuda": 16}
"""Counts are multiples of it: of 16 bits, torch's own products want 16 bytes."""


@dataclass(frozen=True, slots=True)
class Contender:
    """kind: LINEAR or SWIGLU. dense: whether it is one matrix for all rows, which the others are compared with."""

    name: str
    kind: str
    of: Callable[[Load], Attention]
    dense: bool = False

    def inputs(self, load: Load) -> list[Tensor]:
        return load.inputs(self.kind, experts=1 if self.dense else None)


class _DenseSwiglu(torch.autograd.Function):
    """One SwiGLU by torch's products; gate and up are computed again, as the experts' are: the same FLOPs."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        return grouped_loop.swiglu(x, gate, up, down, (len(x),))

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, up, down = ctx.saved_tensors
        return grouped_loop.swiglu_backward(x, gate, up, down, (len(x),), dout)


def _kept_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate[0])) * F.linear(x, up[0]), down[0])


def _torch_multiply(load: Load) -> Callable[[Tensor, Tensor], Tensor]:
    ends = torch.tensor(load.counts, device=load.device).cumsum(0).to(torch.int32)
    return lambda x, weight: aten._grouped_mm(x, weight.transpose(1, 2), ends)


def _torch_swiglu(load: Load) -> Attention:
    multiply = _torch_multiply(load)
    return lambda x, gate, up, down: multiply(F.silu(multiply(x, gate)) * multiply(x, up), down)


def _grouped_swiglu(load: Load) -> Attention:
    return lambda x, gate, up, down: grouped_swiglu(x, gate, up, down, load.counts)


OURS = [
    Contender("grouped_linear", LINEAR, lambda load: lambda x, w: grouped_linear(x, w, load.counts)),
    Contender("grouped_swiglu", SWIGLU, _grouped_swiglu),
]
DENSE = [
    Contender("dense linear", LINEAR, lambda load: lambda x, w: F.linear(x, w[0]), dense=True),
    Contender("dense SwiGLU", SWIGLU, lambda load: _DenseSwiglu.apply, dense=True),
    Contender("dense SwiGLU that keeps gate and up", SWIGLU, lambda load: _kept_swiglu, dense=True),
]
RIVALS = [
    Contender("torch._grouped_mm", LINEAR, _torch_multiply),
    Contender("torch._grouped_mm, SwiGLU that keeps gate and up", SWIGLU, _torch_swiglu),
]
"""Of CUDA: torch's own, which takes bfloat16."""


def contenders_on(device: torch.device) -> list[Contender]:
    """Return what is measured on a device: one matrix for all rows, ours, and torch's own there."""
    return [*DENSE, *OURS, *(RIVALS if device.type == "cuda" else [])]


def formula(kind: str, counts: Sequence[int]) -> Attention:
    """Return the products written down expert by expert, with torch's own gradients."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        parts = [
            F.linear(rows, weights[0][expert])
            if kind == LINEAR
            else _kept_swiglu(rows, *(weight[expert : expert + 1] for weight in weights))
            for expert, rows in enumerate(x.split(list(counts)))
        ]
        return torch.cat(parts)

    return run


def verdict(contender: Contender, load: Load) -> Verdict:
    """Compare out and all gradients with the formula in float64; gradients of experts without rows have to be 0."""
    inputs, dout = contender.inputs(load), load.gradient(contender.kind)
    said = f"{load.name}, {load.rows} rows, {load.width} x {load.inner}, {load.dtype}"
    counts = (load.rows,) if contender.dense else load.counts
    right = formula(contender.kind, counts)
    truth = outcome(right, [x.detach().double().requires_grad_() for x in inputs], dout.double())
    rounded: list[Tensor] | list[None] = [None] * len(truth)
    if load.dtype not in TOLERANCE:
        rounded = outcome(right, inputs, dout)
    try:
        got = outcome(contender.of(load), inputs, dout)
    except Exception as error:  # whatever a kernel dies of, the others are measured
        return Verdict(False, f"{said}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    failures = [
        f"result {number} {failure}"
        for number, (mine, exact, of_dtype) in enumerate(zip(got, truth, rounded, strict=True))
        if (failure := excess(mine, exact, of_dtype, 1.0) if exact.any() else "is not 0" * bool(mine.any()))
    ]
    idle = torch.tensor([not count for count in counts], device=load.device)
    if any(bool(gradient[idle].any()) for gradient in got[2:]):
        failures.append("an expert without rows has a gradient")
    return Verdict(not failures, f"{said}: {', '.join(failures) or 'correct'}")


def same_bits(contender: Contender, load: Load) -> Verdict:
    """Compute twice and compare."""
    inputs, dout = contender.inputs(load), load.gradient(contender.kind)
    first, second = (outcome(contender.of(load), inputs, dout) for _ in range(2))
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Verdict(equal, f"{load.name}: {'the same bits twice' if equal else 'other bits the second time'}")


CHECKED_SIZES = ((256, 128), (200, 100))
"""Multiples of 16, which are loaded 16 bytes at a time, and others."""
CHECKED_COUNTS = {
    "skewed": skewed_counts(20, 1500),
    "one expert has all": (0, 0, 700, 0),
    "one row": (0, 1, 0),
    "none": (0, 0, 0),
}


def checks(device: torch.device) -> Iterator[Load]:
    """Yield what a device's kernels have to get right."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width, inner in CHECKED_SIZES:
            for name, counts in CHECKED_COUNTS.items():
                yield Load(name=name, counts=counts, width=width, inner=inner, dtype=dtype, device=device)


def small(load: Load) -> Load:
    """Return a load like it of about an eighth of the rows, to be checked before it is measured."""
    step = MULTIPLE[load.device.type]
    return replace(load, counts=tuple(-(-count // (8 * step)) * step for count in load.counts))

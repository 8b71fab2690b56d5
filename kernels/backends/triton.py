"""Triton backend: flash attention over lists of tiles, on GPUs, for any plan."""

import importlib.util
from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.gpu.shapes import MAX_WIDTH, Shapes, shapes_for
from farspan.kernels.plan import Plan


@final
class TritonBackend(Backend):
    """Time follows the visible tiles; memory is linear in the rows. float32 to float16, head sizes to 256.

    Triton's interpreter, which it reads from the environment by itself, runs the same kernels on a CPU: for tests.
    """

    rank = 5

    def refusal(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'farspan[triton]'"
        import triton.knobs  # pyright: ignore[reportMissingImports]

        if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
            return None
        return "its kernels are for CUDA devices"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        from farspan.kernels.gpu import schedule

        problem = schedule.Problem(q=q, k=k, v=v, plan=plan, shapes=_shapes(q, v))
        with torch.cuda.device_of(q):
            return schedule.forward(problem)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        from farspan.kernels.gpu import schedule

        problem = schedule.Problem(q=q, k=k, v=v, plan=plan, shapes=_shapes(q, v))
        with torch.cuda.device_of(q):
            return schedule.backward(problem, dout, out, lse)


def _shapes(q: Tensor, v: Tensor) -> Shapes:
    """Return the shapes of tiles for these tensors; raises ValueError for what the kernels cannot do."""
    width = max(q.shape[2], v.shape[2])
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the triton backend computes in float32 to float16, not in {q.dtype}: use another backend")
    if width > MAX_WIDTH:
        raise ValueError(f"the triton backend takes heads of at most {MAX_WIDTH}, not {width}: use another backend")
    return shapes_for(width, q.dtype)


BACKENDS.add("triton", TritonBackend())

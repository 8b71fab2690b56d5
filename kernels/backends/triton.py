"""Triton backend: flash attention over block masks, for any plan, and recurrences; on GPUs.

Kernel files import Triton, which need not be installed: they are imported at the first call.
"""

import importlib.util
from typing import final

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend, KernelRequest
from farspan.kernels.linear_attention.recurrence import ChunkedRecurrentBackend
from farspan.kernels.linear_attention.state import Segment, State
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels.shapes import MAX_WIDTH, Shapes, shapes_for


@final
class TritonBackend(Backend, ChunkedRecurrentBackend):
    """Time follows the unmasked tiles; memory is linear in the rows. float32 to float16, head sizes to 256.

    Triton's interpreter, which it reads from the environment by itself, runs the same kernels on a CPU: for tests.
    """

    # After torch's own kernels, until it has been measured on a GPU.
    rank = 60

    def unavailable_reason(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'farspan[triton]'"
        import triton.knobs  # pyright: ignore[reportMissingImports]

        if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
            return None
        return "its kernels are for CUDA devices"

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
        if max(request.head_dim, request.value_dim) > MAX_WIDTH:
            return f"it takes head sizes up to {MAX_WIDTH}, not {max(request.head_dim, request.value_dim)}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        from farspan.kernels.triton_kernels import attention_launch

        problem = attention_launch.Problem(q=q, k=k, v=v, plan=plan, shapes=_checked_shapes(q, v))
        with torch.cuda.device_of(q):
            return attention_launch.forward(problem)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        from farspan.kernels.triton_kernels import attention_launch

        problem = attention_launch.Problem(q=q, k=k, v=v, plan=plan, shapes=_checked_shapes(q, v))
        with torch.cuda.device_of(q):
            return attention_launch.backward(problem, dout, out, lse)

    @staticmethod
    def chunked_recurrence(
        x: Tensor, a: Tensor, b: Tensor, segment: Segment, decay: Tensor, state: State, *, reverse: bool
    ) -> tuple[Tensor, State]:
        from farspan.kernels.triton_kernels import linear_attention

        _checked_shapes(x, b)
        with torch.cuda.device_of(x):
            return linear_attention.chunked_recurrence(x, a, b, segment, decay, state, reverse=reverse)


def _checked_shapes(q: Tensor, v: Tensor) -> Shapes:
    """Return the tile shapes for q `[T, heads, D]` and v `[S, heads, Dv]`; ConfigError if they are not supported."""
    request = KernelRequest(
        dtype=q.dtype, head_dim=q.shape[2], value_dim=v.shape[2], selects_keys=False, is_recurrent=False
    )
    if reason := _BACKEND.unsupported_reason(request):
        raise ConfigError(f"attention.backend='triton' cannot compute this: {reason}; use attention.backend='auto'.")
    return shapes_for(q.shape[2], v.shape[2], q.dtype)


_BACKEND = TritonBackend()
BACKENDS.add("triton", _BACKEND)

"""Triton backend: flash attention over lists of tiles, for any plan, and scans; on GPUs."""

import importlib.util
from typing import final

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend, KernelRequest
from farspan.kernels.linear_attention.segment import Segment
from farspan.kernels.linear_attention.state import State
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels.shapes import MAX_WIDTH, Shapes, shapes_for


@final
class TritonBackend(Backend):
    """Time follows the visible tiles; memory is linear in the rows. float32 to float16, head sizes to 256.

    Triton's interpreter, which it reads from the environment by itself, runs the same kernels on a CPU: for tests.
    """

    # After torch's own kernels, until it has been measured on a GPU.
    rank = 60

    def unsupported_reason(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'farspan[triton]'"
        import triton.knobs  # pyright: ignore[reportMissingImports]

        if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
            return None
        return "its kernels are for CUDA devices"

    def limit(self, work: KernelRequest) -> str | None:
        if work.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {str(work.dtype).removeprefix('torch.')}"
        if max(work.head_dim, work.value_dim) > MAX_WIDTH:
            return f"it takes head sizes up to {MAX_WIDTH}, not {max(work.head_dim, work.value_dim)}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        from farspan.kernels.triton_kernels import attention_launch as schedule

        problem = schedule.Problem(q=q, k=k, v=v, plan=plan, shapes=self._shapes(q, v))
        with torch.cuda.device_of(q):
            return schedule.forward(problem)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        from farspan.kernels.triton_kernels import attention_launch as schedule

        problem = schedule.Problem(q=q, k=k, v=v, plan=plan, shapes=self._shapes(q, v))
        with torch.cuda.device_of(q):
            return schedule.backward(problem, dout, out, lse)

    def scan_unsupported_reason(self) -> str | None:
        return None

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State
    ) -> tuple[Tensor, State]:
        from farspan.kernels.triton_kernels import linear_attention as scan

        self._shapes(q, v, scans=True)
        with torch.cuda.device_of(q):
            return scan.scan_forward(q, k, v, segment, decay, state)

    def scan_backward(
        self,
        dout: Tensor,
        dstate: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment: Segment,
        decay: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from farspan.kernels.triton_kernels import linear_attention as scan

        self._shapes(q, v, scans=True)
        with torch.cuda.device_of(q):
            return scan.scan_backward(dout, dstate, q, k, v, segment, decay, state)

    def _shapes(self, q: Tensor, v: Tensor, *, scans: bool = False) -> Shapes:
        """Return the shapes of tiles for these tensors; raises ConfigError for what the kernels cannot do."""
        sizes = q.shape[2], v.shape[2]
        work = KernelRequest(dtype=q.dtype, head_dim=sizes[0], value_dim=sizes[1], chooses_keys=False, scans=scans)
        if reason := self.limit(work):
            raise ConfigError(
                f"attention.backend='triton' cannot compute this: {reason}; use attention.backend='auto'."
            )
        return shapes_for(*sizes, q.dtype)


BACKENDS.add("triton", TritonBackend())

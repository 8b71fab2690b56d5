"""Triton backend: flash attention over block masks, for any plan, and recurrences; on GPUs.

Kernel files import Triton, which need not be installed: they are imported at the first call.
"""

import importlib.util
from types import ModuleType
from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes
from farspan.kernels.linear_attention.recurrence import ChunkedRecurrentBackend
from farspan.kernels.linear_attention.state import RecurrenceInputs, Segment, SequencePosition, State
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan


@final
class TritonBackend(Backend, ChunkedRecurrentBackend):
    """Time follows the unmasked tiles; memory is linear in the rows. float32 to float16, head sizes to 256.

    Triton's interpreter, which it reads from the environment by itself, runs the same kernels on a CPU: for tests.
    """

    # After torch's own kernels, until it has been measured on a GPU.
    rank = 60
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    widest = 256
    packs_selections = True

    def unavailable_reason(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'farspan[triton]'"
        import triton.knobs  # pyright: ignore[reportMissingImports]

        if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
            return None
        return "its kernels are for CUDA devices"

    def prepare(self, plan: Plan, spec: InputSpec) -> None:
        _launches(plan).prepare(plan, spec)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        self.check("triton", q, v, selects_keys=False)
        with torch.cuda.device_of(q):
            return _launches(plan).forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.check("triton", q, v, selects_keys=False)
        with torch.cuda.device_of(q):
            return _launches(plan).backward(dout, q, k, v, out, lse, plan)

    def choices(self, plan: Plan, kv_heads: int) -> tuple[Tensor, Tensor]:
        from farspan.kernels.triton_kernels import gathered_launch

        return gathered_launch.choices(plan, kv_heads)

    def prepare_choices(self, plan: Plan, device: torch.device) -> None:
        from farspan.kernels.triton_kernels import gathered_launch

        gathered_launch.prepare_lists(plan, device)

    def pair_sums(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        causal_lse: Tensor,
        *,
        plan: Plan,
        lifetimes: Lifetimes,
    ) -> tuple[Tensor, Tensor]:
        from farspan.kernels.triton_kernels import attention_launch

        with torch.cuda.device_of(q):
            return attention_launch.pair_sums(dout, q, k, v, out, causal_lse, plan=plan, lifetimes=lifetimes)

    def type_gradient(self, sums: Tensor, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
        from farspan.kernels.triton_kernels import attention_launch

        with torch.cuda.device_of(sums):
            return attention_launch.type_gradient(sums, lifetimes, order)

    def prepare_scan(self, segment: Segment, decay: Tensor, before: SequencePosition, spec: InputSpec) -> None:
        from farspan.kernels.triton_kernels import linear_attention

        linear_attention.prepare(segment, decay, before, spec)

    def chunked_recurrence(self, inputs: RecurrenceInputs, *, reverse: bool) -> tuple[Tensor, State]:
        from farspan.kernels.triton_kernels import linear_attention

        self.check("triton", inputs.q, inputs.v, selects_keys=False)
        with torch.cuda.device_of(inputs.q):
            return linear_attention.chunked_recurrence(inputs, reverse=reverse)


def _launches(plan: Plan) -> ModuleType:
    """Return the module that launches the kernels of a plan: of tiles of rows, or of rows gathered by block."""
    from farspan.kernels.triton_kernels import attention_launch, gathered_launch
    from farspan.kernels.triton_kernels.row_tables import selects_by_row

    return gathered_launch if selects_by_row(plan) else attention_launch


BACKENDS.add("triton", TritonBackend())

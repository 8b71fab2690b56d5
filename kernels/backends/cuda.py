"""CUDA backend: fused attention of torch, cuDNN or flash-attn, one call for packed documents.

Masks that show a part of a document take a call for each region of a plan.
"""

from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend, KernelRequest
from farspan.kernels.cuda import varlen
from farspan.kernels.cuda.flash import WIDEST, flash, flash_backward, installed
from farspan.kernels.cuda.operators import DTYPES
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.region_attention import Gradients, RegionAttention

_REGIONS = RegionAttention(flash, flash_backward)


@final
class CudaBackend(Backend):
    """One call for packed documents, and one for each region of other masks; keys are not selected by content."""

    rank = 50
    note = "one call of FlashAttention for packed documents, cuDNN for long or repeated ones"
    deterministic = False
    dtypes = DTYPES
    widest = WIDEST

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it calls CUDA flash attention"

    def calls(self) -> str:
        if not torch.cuda.is_available():
            return ""
        return ", ".join(library.name for library in installed(torch.device("cuda")))

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        selects = "it cannot attend to keys that are selected by content" if request.selects_keys else None
        return super().unsupported_reason(request) or selects

    def slow_reason(self, request: KernelRequest) -> str | None:
        return "it takes a call for each part of a window" if request.is_windowed else None

    def prepare(self, plan: Plan, spec: InputSpec) -> None:
        if varlen.calls_of(plan, spec) is None:
            _REGIONS.prepare(plan, spec.kv_heads, spec.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        self.check("cuda", q, v, selects_keys=plan.selection is not None or plan.lifetime is not None)
        calls = varlen.calls_of(plan, InputSpec.of(q, v))
        return _REGIONS.forward(q, k, v, plan) if calls is None else varlen.forward(q, k, v, calls)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        self.check("cuda", q, v, selects_keys=plan.selection is not None or plan.lifetime is not None)
        calls = varlen.calls_of(plan, InputSpec.of(q, v))
        if calls is None:
            return _REGIONS.backward(dout, q, k, v, out, lse, plan)
        return varlen.backward(dout, q, k, v, out, lse, calls)


BACKENDS.add("cuda", CudaBackend())

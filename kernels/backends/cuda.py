"""CUDA backend: fused attention of torch, cuDNN or flash-attn, called once for each region of a plan."""

from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend, KernelRequest
from farspan.kernels.cuda.flash import WIDEST, flash, flash_backward, installed
from farspan.kernels.cuda.operators import DTYPES
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.region_attention import Gradients, RegionAttention

_REGIONS = RegionAttention(flash, flash_backward)


@final
class CudaBackend(Backend):
    """Fast on long runs of rows; each region costs a launch, and keys selected by content are not supported."""

    rank = 50
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        self.check("cuda", q, v, selects_keys=plan.selection is not None or plan.lifetime is not None)
        return _REGIONS.forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        self.check("cuda", q, v, selects_keys=plan.selection is not None or plan.lifetime is not None)
        return _REGIONS.backward(dout, q, k, v, out, lse, plan)


BACKENDS.add("cuda", CudaBackend())

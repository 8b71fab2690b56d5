"""CUDA backend: fused attention of torch, cuDNN or flash-attn, called once for each region of a plan."""

from typing import final

import torch
from torch import Tensor

from farspan.errors import ConfigError
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

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it calls CUDA flash attention"

    def calls(self) -> str:
        if not torch.cuda.is_available():
            return ""
        return ", ".join(library.name for library in installed(torch.device("cuda")))

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        if request.dtype not in DTYPES:
            return f"it takes bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
        if max(request.head_dim, request.value_dim) > WIDEST:
            return f"it takes head sizes up to {WIDEST}, not {max(request.head_dim, request.value_dim)}"
        if request.selects_keys:
            return "it cannot attend to keys that are selected by content"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        self._check(q, v, plan)
        return _REGIONS.forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        self._check(q, v, plan)
        return _REGIONS.backward(dout, q, k, v, out, lse, plan)

    def _check(self, q: Tensor, v: Tensor, plan: Plan) -> None:
        request = KernelRequest(
            dtype=q.dtype,
            head_dim=q.shape[-1],
            value_dim=v.shape[-1],
            selects_keys=plan.selection is not None or plan.lifetime is not None,
            is_recurrent=False,
        )
        if reason := self.unsupported_reason(request):
            raise ConfigError(f"attention.backend='cuda' cannot compute this: {reason}; use attention.backend='auto'.")


BACKENDS.add("cuda", CudaBackend())

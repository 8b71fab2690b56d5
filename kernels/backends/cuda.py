"""Library backend: fused attention for CUDA, of torch or of packages, called once for each region of a plan."""

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
class LibraryBackend(Backend):
    """Fast on long runs of rows; each region costs a launch, and keys chosen by content are beyond it."""

    rank = 50
    deterministic = False

    def unsupported_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it calls CUDA flash attention"

    def calls(self) -> str:
        if not torch.cuda.is_available():
            return ""
        return ", ".join(library.name for library in installed(torch.device("cuda")))

    def limit(self, work: KernelRequest) -> str | None:
        if work.dtype not in DTYPES:
            return f"it takes bfloat16 and float16, not {str(work.dtype).removeprefix('torch.')}"
        if max(work.head_dim, work.value_dim) > WIDEST:
            return f"it takes head sizes up to {WIDEST}, not {max(work.head_dim, work.value_dim)}"
        if work.chooses_keys:
            return "it cannot attend to keys that are chosen by content"
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
        chooses_keys = plan.selection is not None or plan.lifetime is not None
        sizes = q.shape[-1], v.shape[-1]
        work = KernelRequest(
            dtype=q.dtype, head_dim=sizes[0], value_dim=sizes[1], chooses_keys=chooses_keys, scans=False
        )
        if reason := self.limit(work):
            raise ConfigError(
                f"attention.backend='library' cannot compute this: {reason}; use attention.backend='auto'."
            )


BACKENDS.add("library", LibraryBackend())

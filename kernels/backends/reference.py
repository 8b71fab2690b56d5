"""Reference backend: attention as it is written on paper, in any dtype on any device; the judge of all others."""

from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.plan import Plan


@final
class ReferenceBackend(Backend):
    """Holds all scores at once: memory and time grow with queries x keys."""

    rank = 100

    def refusal(self, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        scores, group = _scores(q, k, plan)
        lse = scores.logsumexp(dim=-1)  # [Hq, T]
        probability = (scores - _finite(lse).unsqueeze(-1)).exp()
        values = v.to(scores.dtype).repeat_interleave(group, dim=1)
        return torch.einsum("hts,shd->thd", probability, values), lse.t().contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """FlashAttention (arXiv 2205.14135) appendix B.2: dS = P * (dO V^T - rowsum(dO * O))."""
        scores, group = _scores(q, k, plan)
        dtype, shared = scores.dtype, (k.shape[1], group)
        probability = (scores - _finite(lse.to(dtype)).t().unsqueeze(-1)).exp()  # [Hq, T, S]
        dout, scale = dout.to(dtype), q.shape[-1] ** -0.5
        delta = (dout * out.to(dtype)).sum(dim=-1).t().unsqueeze(-1)  # [Hq, T, 1]
        dprobability = torch.einsum("thd,shd->hts", dout, v.to(dtype).repeat_interleave(group, dim=1))
        dscores = probability * (dprobability - delta) * scale
        dq = torch.einsum("hts,shd->thd", dscores, k.to(dtype).repeat_interleave(group, dim=1))
        dk = torch.einsum("hts,thd->shd", dscores, q.to(dtype))
        dv = torch.einsum("hts,thd->shd", probability, dout)
        return dq, dk.unflatten(1, shared).sum(2), dv.unflatten(1, shared).sum(2)


def _scores(q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, int]:
    """Return scaled scores `[query heads, queries, keys]`, -inf where invisible, and the query heads per KV head."""
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q.to(dtype), k.to(dtype).repeat_interleave(group, dim=1))
    return (scores * q.shape[-1] ** -0.5).masked_fill(~plan.mask().to(q.device), float("-inf")), group


def _finite(lse: Tensor) -> Tensor:
    """Replace the -inf of rows that see nothing, so that exp(score - lse) is exp(-inf) = 0 and not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


BACKENDS.add("reference", ReferenceBackend())

"""Reference backend: attention as written on paper, in any dtype on any device; all others are tested against it."""

from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.linear_attention.state import RecurrenceInputs, State
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planning.plan import Plan


@final
class ReferenceBackend(Backend, RecurrentBackend):
    """Holds all scores at once: memory and time grow with queries x keys."""

    rank = 100

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        scores, group = _scores(q, k, plan)
        lse = scores.logsumexp(dim=-1)  # [Hq, T]
        probability = (scores - _finite(lse).unsqueeze(-1)).exp()  # [Hq, T, S]
        values = v.to(scores.dtype).repeat_interleave(group, dim=1)  # [S, Hk, Dv] -> [S, Hq, Dv]
        return torch.einsum("hts,shd->thd", probability, values), lse.t().contiguous()  # lse [T, Hq]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """FlashAttention (arXiv 2205.14135) appendix B.2: dS = P * (dO V^T - rowsum(dO * O))."""
        scores, group = _scores(q, k, plan)
        dtype, shared = scores.dtype, (k.shape[1], group)
        probability = (scores - _finite(lse.to(dtype)).t().unsqueeze(-1)).exp()  # [Hq, T, S]
        dout, scale = dout.to(dtype), q.shape[-1] ** -0.5
        delta = (dout * out.to(dtype)).sum(dim=-1).t().unsqueeze(-1)  # [Hq, T, 1]
        # Hk -> Hq by repetition on the way in, Hq -> [Hk, group] -> Hk by a sum on the way out.
        dprobability = torch.einsum("thd,shd->hts", dout, v.to(dtype).repeat_interleave(group, dim=1))
        dscores = probability * (dprobability - delta) * scale
        dq = torch.einsum("hts,shd->thd", dscores, k.to(dtype).repeat_interleave(group, dim=1))
        dk = torch.einsum("hts,thd->shd", dscores, q.to(dtype))
        dv = torch.einsum("hts,thd->shd", probability, dout)
        return dq, dk.unflatten(1, shared).sum(2), dv.unflatten(1, shared).sum(2)  # [S, Hk, group, ..] -> [S, Hk, ..]

    def scan(self, inputs: RecurrenceInputs) -> tuple[Tensor, State]:
        segment, state, group = inputs.segment, inputs.state, inputs.q.shape[1] // inputs.k.shape[1]
        queries, keys, values = (x.to(state.value.dtype) for x in (inputs.q, inputs.k, inputs.v))
        # [T, Hk, width] -> [T, Hq, width]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        weight, of_state, to_end, state_to_end = _weights(inputs)
        scores = torch.einsum("ihd,jhd->hij", queries, keys) * weight
        out = torch.einsum("hij,jhe->ihe", scores, values)
        out += torch.einsum("ihd,hde->ihe", queries, state.value) * of_state
        after = torch.einsum("jhd,jhe->hde", keys * to_end, values) + state_to_end * state.value
        return out, State(after, segment.last if segment.tokens else state.last)

    def scan_backward(
        self, dout: Tensor, dstate: Tensor, inputs: RecurrenceInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Out and the state after are sums of products: each factor's gradient is the sum without that factor."""
        state, shared = inputs.state, (inputs.k.shape[1], inputs.q.shape[1] // inputs.k.shape[1])
        dout, queries, keys, values = (x.to(state.value.dtype) for x in (dout, inputs.q, inputs.k, inputs.v))
        keys, values = keys.repeat_interleave(shared[1], dim=1), values.repeat_interleave(shared[1], dim=1)
        weight, of_state, to_end, state_to_end = _weights(inputs)
        scores = torch.einsum("ihd,jhd->hij", queries, keys) * weight
        dscores = torch.einsum("ihe,jhe->hij", dout, values) * weight
        # Each gradient: the part through the scores, then the part through a state.
        dq = torch.einsum("hij,jhd->ihd", dscores, keys)
        dq += torch.einsum("ihe,hde->ihd", dout, state.value) * of_state
        dk = torch.einsum("hij,ihd->jhd", dscores, queries)
        dk += torch.einsum("jhe,hde->jhd", values, dstate) * to_end
        dv = torch.einsum("hij,ihe->jhe", scores, dout)
        dv += torch.einsum("jhd,hde->jhe", keys, dstate) * to_end
        dbefore = torch.einsum("ihd,ihe->hde", queries * of_state, dout) + state_to_end * dstate
        # [T, Hq, width] -> [T, Hk, Hq/Hk, width] -> [T, Hk, width]
        return dq, dk.unflatten(1, shared).sum(2), dv.unflatten(1, shared).sum(2), dbefore


def _weights(inputs: RecurrenceInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights exp(-s distance) of earlier for later tokens of the same document, else 0.

    Of rows for rows `[Hq, T, T]`, of the state for rows and of rows for the state after `[T, Hq, 1]`, of the state for
    the state after `[Hq, 1, 1]`.
    """
    segment, decay = inputs.segment, inputs.decay.to(inputs.state.value)
    before = inputs.state.last
    after = segment.last if segment.tokens else before
    documents, positions = segment.rows.document, segment.rows.position
    document = torch.cat([documents, documents.new_tensor([before.document, after.document])]).to(decay.device)
    position = torch.cat([positions, positions.new_tensor([before.position, after.position])]).to(decay.device)
    distance = position[:, None] - position[None, :]
    mask = (document[:, None] == document[None, :]) & (document >= 0) & (distance >= 0)
    weight = torch.where(mask, torch.exp(-decay[:, None, None] * distance.clamp(min=0)), 0.0)
    # Row and column -2 are the state before, -1 the state after. [Hq, T] -> [T, Hq, 1]
    of_state, to_end = weight[:, :-2, -2].t().unsqueeze(-1), weight[:, -1, :-2].t().unsqueeze(-1)
    return weight[:, :-2, :-2], of_state, to_end, weight[:, -1, -2, None, None]


def _scores(q: Tensor, k: Tensor, plan: Plan) -> tuple[Tensor, int]:
    """Scaled scores `[Hq, T, S]`, -inf where masked, and the query heads per KV head."""
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q.to(dtype), k.to(dtype).repeat_interleave(group, dim=1))
    return (scores * q.shape[-1] ** -0.5).masked_fill(~plan.mask().to(q.device), float("-inf")), group


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for the -inf of rows that see nothing: exp(-inf - 0) = 0, where -inf - -inf is NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


BACKENDS.add("reference", ReferenceBackend())

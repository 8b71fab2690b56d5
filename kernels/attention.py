"""Attention of rows to rows on one device: the two functions that every strategy is built from.

Legend: T query rows, S key rows, Hq query heads, Hk KV heads (Hq % Hk == 0), D head dim, Dv value head dim.
"""

from functools import partial

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.merge import empty_partial
from farspan.kernels.planner import InputSpec, RoutedKeys
from farspan.kernels.planning.plan import Plan


def prepare_attention(
    masked: Plan, tokens: Tensor, routed: RoutedKeys | None, spec: InputSpec, *, backend: str
) -> None:
    """Make what passes need of a mask's plan and the keys of these tokens, int64 `[keys]`, ahead of them.

    routed: see `farspan.kernels.planner.KeyRouting.prepare`.
    """
    if routed is None or masked.is_empty:
        return
    if masked.isolation is not None:
        masked.isolation.to(spec.device)
    for plan in routed.prepare(masked, tokens, spec.device):
        BACKENDS.get(backend).prepare(plan, spec)


@torch.no_grad()
def attention_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, backend: str) -> tuple[Tensor, Tensor]:
    """Return (out `[T, Hq, Dv]`, lse `[T, Hq]`) of softmax(q k^T / sqrt(D)) v over the visible keys.

    q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]` of one dtype, float64 to float16. `out` comes in that dtype or in
    the accumulation dtype; `lse` is the natural log-sum-exp of the scaled scores in the accumulation dtype (float64
    for float64, else float32). A row that sees no key has out 0 and lse -inf. Not differentiable by autograd: see
    `attention_backward`. Padding rows may hold anything, and numbers that are not finite stay in their document (see
    `farspan.kernels.isolation`). Raises ValueError on bad shapes or dtypes, and for a plan of other rows or heads.
    """
    _check_shapes(q, k, v, plan)
    # Backends never meet a plan without visible pairs, nor tensors without rows.
    if plan.is_empty:
        return empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    attend = partial(BACKENDS.get(backend).forward, plan=plan)
    return attend(q, k, v) if plan.isolation is None else plan.isolation.forward(attend, q, k, v)


@torch.no_grad()
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, *, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`) for the pairs of `plan`.

    `out` `[T, Hq, Dv]` and `lse` `[T, Hq]` may be those of softmax over MORE keys than the plan's, already merged over
    all parts: then the gradients of disjoint parts add up (FlashAttention, arXiv 2205.14135, appendix B.2). Gradients
    have the dtype of q or wider. Raises ValueError on bad shapes or dtypes.
    """
    _check_shapes(q, k, v, plan)
    if dout.shape != out.shape or out.shape != (*q.shape[:2], v.shape[2]) or lse.shape != q.shape[:2]:
        # out may be float32 next to 16-bit q, so only shapes are compared
        shapes = f"dout {list(dout.shape)}, out {list(out.shape)}, lse {list(lse.shape)}"
        raise ValueError(f"{shapes} do not fit q {list(q.shape)} and v {list(v.shape)}")
    if plan.is_empty:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    attend, given = partial(BACKENDS.get(backend).backward, plan=plan), (dout, q, k, v, out, lse)
    return attend(*given) if plan.isolation is None else plan.isolation.backward(attend, *given)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, name: str) -> None:
    """Raise ValueError, about `name`, unless q `[T, Hq, D]`, k `[S, Hk, D]` and v `[S, Hk, Dv]` fit each other."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{name} wants q [T, Hq, D], k [S, Hk, D], v [S, Hk, Dv]; got {shapes}")
    if min(q.shape[1], k.shape[1], q.shape[2], v.shape[2]) < 1:
        raise ValueError(f"{name} wants at least one head of size 1; got {shapes}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly; got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{name} wants one dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    check_qkv(q, k, v, name="attention")
    if q.shape[1] != plan.heads:
        raise ValueError(f"the plan is for {plan.heads} query heads; got q {list(q.shape)}")
    if q.shape[0] != len(plan.queries) or k.shape[0] != len(plan.keys):
        shapes = f"q {list(q.shape)} and k {list(k.shape)}"
        raise ValueError(f"the plan is for {len(plan.queries)} queries and {len(plan.keys)} keys; got {shapes}")

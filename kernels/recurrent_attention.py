"""Decayed linear attention of a stretch of rows on one device: what every strategy for a recurrence is built from.

Legend: T rows, Hq query heads, Hk key/value heads (Hq % Hk == 0), D head size, Dv value head size.
"""

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.linear_attention.segment import Segment, SequencePosition
from farspan.kernels.linear_attention.state import State, empty_state
from farspan.kernels.masks.rows import PADDING
from farspan.kernels.merge import accumulation_dtype


@torch.no_grad()
def recurrent_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State | None = None, *, backend: str
) -> tuple[Tensor, State]:
    """Return (out `[T, Hq, Dv]`, the state left) with out_i = sum_j exp(-s (position_i - position_j)) (q_i k_j) v_j.

    The sum is over the tokens j of i's document at or before i; there is no softmax and no scale (MiniMax-01, arXiv
    2501.08313, section 2.2). q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]` of one dtype, float64 to float16; out
    comes in it or wider; decay: the rates s >= 0 of the query heads, float `[Hq]`. `state` is what the rows before
    have left; it enters rows of its document only. Sums are float32, float64 for float64. Padding gives out 0. Not
    differentiable by autograd: see `recurrent_attention_backward`. Raises ValueError on bad shapes or rates,
    ConfigError for a backend that cannot scan.
    """
    _check(q, k, v, segment, decay, state)
    state = state or empty_state(q.shape[1], q.shape[2], v.shape[2], like=q)
    return _scanner(backend).scan(q, k, v, segment, decay, state)


@torch.no_grad()
def recurrent_attention_backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: Segment,
    decay: Tensor,
    state: State | None = None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, the gradient of `state.value` `[Hq, D, Dv]`).

    `dout` `[T, Hq, Dv]` is the gradient of out, `dstate` `[Hq, D, Dv]` that of the value of the state left, None for 0.
    dq, dk and dv come in the dtype of q or wider. Without a state its gradient is 0.
    """
    _check(q, k, v, segment, decay, state)
    if dout.shape != (*q.shape[:2], v.shape[2]):
        raise ValueError(f"dout {list(dout.shape)} does not fit q {list(q.shape)} and v {list(v.shape)}")
    state = state or empty_state(q.shape[1], q.shape[2], v.shape[2], like=q)
    dstate = torch.zeros_like(state.value) if dstate is None else dstate
    if dstate.shape != state.value.shape:
        raise ValueError(f"dstate {list(dstate.shape)} does not fit a state of {list(state.value.shape)}")
    return _scanner(backend).scan_backward(dout, dstate, q, k, v, segment, decay, state)


def _scanner(name: str) -> Backend:
    backend = BACKENDS.get(name)
    reason = backend.scan_unsupported_reason()
    if reason is not None:
        raise ConfigError(f"attention.backend={name!r} cannot run a recurrent mechanism: {reason}.")
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State | None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"a scan wants q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]; got {shapes}")
    if len(segment) != q.shape[0] or len(segment) != k.shape[0]:
        raise ValueError(f"the stretch has {len(segment)} rows; got {shapes}")
    if min(q.shape[1], k.shape[1], q.shape[2], v.shape[2]) < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly; got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"a scan wants one dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if decay.shape != q.shape[1:2] or not bool(((decay >= 0) & decay.isfinite()).all()):
        raise ValueError(
            f"a scan wants a finite rate of decay, 0 or more, for each of {q.shape[1]} query heads; got {decay}"
        )
    if state is not None:
        _check_state(state, (q.shape[1], q.shape[2], v.shape[2]), accumulation_dtype(q.dtype), segment.first)


def _check_state(state: State, shape: tuple[int, ...], dtype: torch.dtype, first: SequencePosition) -> None:
    if state.value.shape != shape or state.value.dtype != dtype:
        raise ValueError(
            f"a state of {[*shape]} in {dtype} belongs to this scan; got {[*state.value.shape]} in {state.value.dtype}"
        )
    if state.place.document == first.document != PADDING and state.place.position >= first.position:
        raise ValueError(f"the state was left at {state.place}, which is not before the stretch: {first}")

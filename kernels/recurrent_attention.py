"""Decayed linear attention of a segment of rows on one device: what every strategy for a recurrence is built from.

Legend: T rows, Hq query heads, Hk key/value heads (Hq % Hk == 0), D head size, Dv value head size.
"""

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.attention import check_qkv
from farspan.kernels.backend import BACKENDS
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.linear_attention.state import RecurrenceInputs, Segment, State, empty_state
from farspan.kernels.masks.rows import PADDING
from farspan.kernels.merge import accumulation_dtype


@torch.no_grad()
def recurrent_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State | None = None, *, backend: str
) -> tuple[Tensor, State]:
    """Return (out `[T, Hq, Dv]`, the state after) with out_i = sum_j exp(-s (position_i - position_j)) (q_i k_j) v_j.

    The sum is over the tokens j of i's document at or before i; there is no softmax and no scale (MiniMax-01, arXiv
    2501.08313, section 2.2). q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]` of one dtype, float64 to float16; out
    comes in it or wider; decay: the rates s >= 0 of the query heads, float `[Hq]`. `state` is that after the rows
    before; it enters rows of its document only. Sums are float32, float64 for float64. Padding gives out 0. Not
    differentiable by autograd: see `recurrent_attention_backward`. Raises ValueError on bad shapes or rates,
    ConfigError for a backend without recurrences.
    """
    return _recurrent_backend(backend).scan(_checked(q, k, v, segment, decay, state))


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

    `dout` `[T, Hq, Dv]` is the gradient of out, `dstate` `[Hq, D, Dv]` that of the value of the state after, None for
    0. dq, dk and dv come in the dtype of q or wider. Without a state its gradient is 0.
    """
    inputs = _checked(q, k, v, segment, decay, state)
    value = inputs.state.value
    if dout.shape != (*q.shape[:2], v.shape[2]):
        raise ValueError(f"dout {list(dout.shape)} does not fit q {list(q.shape)} and v {list(v.shape)}")
    dstate = torch.zeros_like(value) if dstate is None else dstate
    if dstate.shape != value.shape:
        raise ValueError(f"dstate {list(dstate.shape)} does not fit a state of {list(value.shape)}")
    return _recurrent_backend(backend).scan_backward(dout, dstate, inputs)


def _recurrent_backend(name: str) -> RecurrentBackend:
    backend = BACKENDS.get(name)
    if not isinstance(backend, RecurrentBackend):
        raise ConfigError(f"attention.backend={name!r} has softmax attention only, and no recurrent mechanism.")
    return backend


def _checked(q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State | None) -> RecurrenceInputs:
    """Return the inputs, with an empty state if there is none; raises ValueError where they do not fit."""
    check_qkv(q, k, v, name="a recurrence")
    if len(segment) != q.shape[0] or len(segment) != k.shape[0]:
        raise ValueError(f"the segment has {len(segment)} rows; got q {list(q.shape)} and k {list(k.shape)}")
    if decay.shape != q.shape[1:2] or not bool(((decay >= 0) & decay.isfinite()).all()):
        raise ValueError(f"each of {q.shape[1]} query heads needs a finite rate of decay, 0 or more; got {decay}")
    if state is None:
        state = empty_state(q.shape[1], q.shape[2], v.shape[2], like=q)
    value, shape, dtype = state.value, (q.shape[1], q.shape[2], v.shape[2]), accumulation_dtype(q.dtype)
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(f"the state must be {[*shape]} in {dtype}; got {[*value.shape]} in {value.dtype}")
    if state.last.document == segment.first.document != PADDING and state.last.position >= segment.first.position:
        raise ValueError(f"the state ends at {state.last}, which is not before the segment: {segment.first}")
    return RecurrenceInputs(q=q, k=k, v=v, segment=segment, decay=decay, state=state)

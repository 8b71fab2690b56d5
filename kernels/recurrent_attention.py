"""Decayed linear attention of a segment of rows on one device: what every strategy for a recurrence is built from.

Legend: T rows, Hq query heads, Hk key/value heads (Hq % Hk == 0), D head size, Dv value head size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.attention import check_qkv
from farspan.kernels.backend import BACKENDS
from farspan.kernels.isolation import Places, bad_rows, poison_, surely_none, zeroed
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.linear_attention.state import NO_POSITION, RecurrenceInputs, Segment, State, empty_state
from farspan.kernels.masks.rows import PADDING
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import InputSpec


def prepare_recurrence(segment: Segment, decay: Tensor, spec: InputSpec, *, backend: str) -> None:
    """Make what passes over a segment without a state before it need, ahead of them.

    See `farspan.kernels.planner.SequenceAttention.prepare`.
    """
    if segment.isolation is not None:
        segment.isolation.to(spec.device)
    if segment.tokens:
        _recurrent_backend(backend).prepare_scan(segment, decay, NO_POSITION, spec)


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
    inputs, scan = _checked(q, k, v, segment, decay, state), _recurrent_backend(backend).scan
    isolation = segment.isolation_after(inputs.state.last)
    if isolation is None:
        return scan(inputs)
    here = isolation.to(q.device)
    bad_queries, bad_keys = bad_rows(here.queries.limit[:-1], q), _with_state(here.keys, (k, v), inputs.state.value)
    if surely_none(bad_queries) and surely_none(bad_keys):
        return scan(inputs)
    out, after = scan(_without(inputs, bad_queries, bad_keys))
    reached = here.queries_after(bad_keys)
    poison_(reached[:-1] | (bad_queries & (here.queries.document[:-1] > 0)), out)
    poison_(reached[-1:], after.value[None])
    return out, after


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
    scan_backward, isolation = _recurrent_backend(backend).scan_backward, segment.isolation_after(inputs.state.last)
    if isolation is None:
        return scan_backward(dout, dstate, inputs)
    here = isolation.to(q.device)
    bad_queries, bad_keys = _with_state(here.queries, (dout, q), dstate), _with_state(here.keys, (k, v), value)
    if surely_none(bad_queries) and surely_none(bad_keys):
        return scan_backward(dout, dstate, inputs)
    (dout,), (dstate,) = zeroed(bad_queries[:-1], dout), zeroed(bad_queries[-1:], dstate[None])
    dstate = dstate[0]
    dq, dk, dv, dbefore = scan_backward(dout, dstate, _without(inputs, bad_queries[:-1], bad_keys))
    # A bad row has bad gradients of its own, too.
    of_queries = (here.queries_after(bad_keys) | (bad_queries & (here.queries.document > 0)))[:-1]
    of_keys = here.keys_before(bad_queries) | (bad_keys & (here.keys.document > 0))
    poison_(of_queries, dq)
    poison_(of_keys[:-1], dk, dv)
    poison_(of_keys[-1:], dbefore[None])
    return dq, dk, dv, dbefore


def _with_state(places: Places, tensors: tuple[Tensor, ...], state: Tensor) -> Tensor:
    """Return which rows of tensors `[T, heads, width]` are bad, and last whether a state is, bool `[T + 1]`."""
    return torch.cat((bad_rows(places.limit[:-1], *tensors), ~state.isfinite().all()[None]))


def _without(inputs: RecurrenceInputs, bad_queries: Tensor, bad_keys: Tensor) -> RecurrenceInputs:
    """Return the inputs with zeros for bad rows, bool `[T]`, and `[T + 1]` with the state last."""
    (q,), (k, v) = zeroed(bad_queries, inputs.q), zeroed(bad_keys[:-1], inputs.k, inputs.v)
    value = zeroed(bad_keys[-1:], inputs.state.value[None])[0][0]
    return replace(inputs, q=q, k=k, v=v, state=State(value, inputs.state.last))


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

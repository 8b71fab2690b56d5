"""Sweep: the one sum that a scan and all of its gradients are made of, each time of other tensors.

Along a stretch, from its start or from its end, out_i = sum over j up to i of w_ij (x_i a_j) b_j with
w_ij = exp(-s |position_i - position_j|) within a document, else 0. Then, for out of q, k, v and its gradient dout,
dq sweeps (dout, v, k) from the start, dk sweeps (v, dout, q) and dv sweeps (k, q, dout) from the end. A sweep carries
the state, the sum of w_j a_j b_j^T so far, from block to block: the backward pass needs nothing kept but q, k and v.
"""

from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.linear_attention.segment import Segment, SequencePosition
from farspan.kernels.linear_attention.state import State, decayed


class Sweep(Protocol):
    """What a backend has to give."""

    def __call__(
        self, x: Tensor, a: Tensor, b: Tensor, segment: Segment, decay: Tensor, carried: State, *, from_end: bool
    ) -> tuple[Tensor, State]:
        """Return (out `[T, H, B]`, the state after the last row swept) of x `[T, H, A]`, a and b `[T, H', A or B]`.

        The larger of H and H' is Hq. Where H is the smaller, out is summed over the query heads that share one of H.
        carried: the sum of w a_j b_j^T over the rows swept before, `[Hq, A, B]`, of its document at its position.
        """
        ...


def scan_by_sweep(
    sweep: Sweep, q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State
) -> tuple[Tensor, State]:
    """See `farspan.kernels.recurrent_attention.scan`."""
    return sweep(q, k, v, segment, decay, state, from_end=False)


def scan_backward_by_sweeps(
    sweep: Sweep,
    dout: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: Segment,
    decay: Tensor,
    state: State,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.recurrent_attention.scan_backward`."""
    if not segment.tokens:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dstate
    after, after_transposed = State(dstate, segment.last), State(dstate.mT.contiguous(), segment.last)
    before = State(state.value.mT.contiguous(), state.place)
    dq, _ = sweep(dout, v, k, segment, decay, before, from_end=False)
    dk, _ = sweep(v, dout, q, segment, decay, after_transposed, from_end=True)
    dv, reached = sweep(k, q, dout, segment, decay, after, from_end=True)
    return dq, dk, dv, _gradient_at(state.place, reached, decay)


def _gradient_at(place: SequencePosition, reached: State, decay: Tensor) -> Tensor:
    """Return the gradient of a state at `place` from what a sweep from the end has carried to the first row."""
    if place.document != reached.place.document:
        return torch.zeros_like(reached.value)
    return decayed(reached.value, reached.place.position - place.position, decay)

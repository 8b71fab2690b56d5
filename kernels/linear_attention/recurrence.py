"""Backends of recurrences, and the chunked recurrence that linear attention and all of its gradients are made of.

Along a segment, from its start or in reverse, out_i = sum over j up to i of w_ij (x_i a_j) b_j with
w_ij = exp(-s |position_i - position_j|) within a document, else 0 (MiniMax-01, arXiv 2501.08313, section 2.2). Then,
with the gradient dout of out,

    out = recurrence(q, k, v)                dq = recurrence(dout, v, k)
    dk = recurrence(v, dout, q) reversed     dv = recurrence(k, q, dout) reversed

A recurrence carries the state, the sum of w_j a_j b_j^T so far, from chunk to chunk: the backward pass needs nothing
but q, k, v and the state before the segment.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import RecurrenceInputs, Segment, SequencePosition, State
from farspan.kernels.planner import InputSpec


class RecurrentBackend(ABC):
    """What a backend computes besides softmax attention if it can run recurrent mechanisms."""

    def prepare_scan(self, segment: Segment, decay: Tensor, before: SequencePosition, spec: InputSpec) -> None:
        """Make what both passes need of a segment after a state at `before`, ahead of them; here nothing."""
        return

    @abstractmethod
    def scan(self, inputs: RecurrenceInputs) -> tuple[Tensor, State]:
        """See `farspan.kernels.recurrent_attention.recurrent_attention_forward`."""

    @abstractmethod
    def scan_backward(
        self, dout: Tensor, dstate: Tensor, inputs: RecurrenceInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `farspan.kernels.recurrent_attention.recurrent_attention_backward`."""


class ChunkedRecurrentBackend(RecurrentBackend):
    """A recurrent backend by one function, the chunked recurrence."""

    @abstractmethod
    def chunked_recurrence(self, inputs: RecurrenceInputs, *, reverse: bool) -> tuple[Tensor, State]:
        """Return (out `[T, H, B]`, the state after the last row).

        inputs: x `[T, H, A]` as q, a `[T, H', A]` as k, b `[T, H', B]` as v. The larger of H and H' is Hq. Where H is
        the smaller, out is summed over the query heads that share one of H.
        state: the sum of w a_j b_j^T over the rows before, `[Hq, A, B]`, of its document at its last position; in
        reverse, over the rows after.
        """

    def scan(self, inputs: RecurrenceInputs) -> tuple[Tensor, State]:
        return self.chunked_recurrence(inputs, reverse=False)

    def scan_backward(
        self, dout: Tensor, dstate: Tensor, inputs: RecurrenceInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, segment, state = inputs.q, inputs.k, inputs.v, inputs.segment, inputs.state
        if not segment.tokens:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dstate
        # [Hq, D, Dv] -> [Hq, Dv, D]: dq and dk read and write states of (v, k), not of (k, v).
        before = State(state.value.mT.contiguous(), state.last)
        after, after_transposed = State(dstate, segment.last), State(dstate.mT.contiguous(), segment.last)
        dq, _ = self.chunked_recurrence(replace(inputs, q=dout, k=v, v=k, state=before), reverse=False)
        dk, _ = self.chunked_recurrence(replace(inputs, q=v, k=dout, v=q, state=after_transposed), reverse=True)
        dv, at_first = self.chunked_recurrence(replace(inputs, q=k, k=q, v=dout, state=after), reverse=True)
        if state.last.document != at_first.last.document:
            return dq, dk, dv, torch.zeros_like(at_first.value)
        # From the first row of the segment back to the state before it. [Hq] -> [Hq, 1, 1]
        distance = at_first.last.position - state.last.position
        weight = torch.exp(-distance * inputs.decay.double()).to(at_first.value)[:, None, None]
        return dq, dk, dv, at_first.value * weight

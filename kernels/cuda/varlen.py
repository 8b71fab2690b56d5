"""Attention of packed documents in one call, for plans whose mask is full or causal; see `planning/varlen.py`.

cuDNN takes the sequences that are worth a plan of their own; all others share a call of a library for packed sequences.
What a call needs is made and copied to the device once for a plan, however many layers share it.

Legend: T queries, S keys, Hq query heads, Hk KV heads, D head size, Dv value head size, W = the larger of both, a
multiple of 8.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.cuda.flash import choose, fit, installed, width_of
from farspan.kernels.cuda.operators import Cudnn, Gradients, Lengths, Library
from farspan.kernels.device_copies import copy_to
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.varlen import VarlenCall, VarlenRows, VarlenSequence

CUDNN_PAIRS = 1 << 28
"""Pairs of one shape that are worth a plan of cuDNN. FlashAttention 2 takes 4.9e-15 s more for each FLOP of a forward
pass, forward twice and backward (by the TFLOP/s in `flash.py`): 0.7 s in 32 layers of 32 heads of 128, where the plan
takes a second, once. That is one document of 23,000 tokens, or 8 of 8,192."""
MOST_REPEATS = 256
"""Most sequences over which pairs of a shape add up."""
MOST_COUNTED, MOST_PLANNED = 1 << 14, 1 << 9
"""Shapes that are counted, the latest ones, and those that cuDNN makes a plan for, which it keeps to the end: neither
grows for ever where long documents have new lengths in every sequence."""


class ShapeCounter:
    """How many pairs of each shape this process has met: what is met for long enough is worth a plan of cuDNN.

    worth: that many pairs. Threads may count at the same time.
    """

    def __init__(self, worth: int = CUDNN_PAIRS) -> None:
        self.worth = worth
        self._pairs: dict[tuple[object, ...], int] = {}
        self._planned: set[tuple[object, ...]] = set()
        self._counting = Lock()

    def is_worth(self, sequence: VarlenSequence, *kind: object) -> bool:
        """Count a sequence of a plan; return whether its shape, of this kind of tensors, has come to `worth`."""
        # Shorter ones are not counted: their lengths are too many, and each would have to come again too often.
        if sequence.pairs < self.worth // MOST_REPEATS or min(sequence.queries, sequence.keys) < Cudnn.fewest:
            return False
        shape = sequence.queries, sequence.keys, sequence.causal, *kind
        with self._counting:
            if shape in self._planned:
                return True
            # Put last: the first one is that which has not been met for longest.
            pairs = self._pairs[shape] = self._pairs.pop(shape, 0) + sequence.pairs
            if len(self._pairs) > MOST_COUNTED:
                del self._pairs[next(iter(self._pairs))]
            if pairs < self.worth or len(self._planned) >= MOST_PLANNED:
                return False
            self._planned.add(shape)
            return True


SHAPES = ShapeCounter()


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCall:
    """queries, keys: the rows of the call, int64 on the device; a slice if they follow each other.

    library, lengths: what computes it, and the lengths of its sequences; cuDNN takes a single one.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    causal: bool
    library: Library | Cudnn
    lengths: Lengths

    @staticmethod
    def of(call: VarlenCall, library: Library | Cudnn, device: torch.device) -> "DeviceCall":
        queries, keys = (_rows(x, device) for x in (call.queries, call.keys))
        return DeviceCall(queries, keys, call.causal, library, _lengths(call, device))

    def of_queries(self, *tensors: Tensor) -> list[Tensor]:
        """Return the rows of the call's queries."""
        return [_take(x, self.queries) for x in tensors]

    def of_keys(self, *tensors: Tensor) -> list[Tensor]:
        """Return the rows of the call's keys."""
        return [_take(x, self.keys) for x in tensors]

    def has_all(self, *tensors: Tensor) -> bool:
        """Return whether the call has all queries and, given two tensors, all keys, in order."""
        return all(rows == slice(0, len(x)) for rows, x in zip((self.queries, self.keys), tensors, strict=False))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[T, Hq, W]` and lse `[Hq, T]` of the call's rows."""
        if isinstance(self.library, Cudnn):
            return self.library.forward(q, k, v, causal=self.causal, scale=scale)
        return self.library.forward(q, k, v, self.lengths, causal=self.causal, scale=scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
    ) -> Gradients:
        """Return dq `[T, Hq, W]`, dk and dv `[S, Hk, W]` of the call's rows."""
        if isinstance(self.library, Cudnn):
            return self.library.backward(dout, q, k, v, out, lse, causal=self.causal, scale=scale)
        return self.library.backward(dout, q, k, v, out, lse, self.lengths, causal=self.causal, scale=scale)


def calls_of(plan: Plan, spec: InputSpec) -> list[DeviceCall] | None:
    """Return the calls of a plan; None if its mask shows a part of a document, or rows are in too odd an order."""
    if not plan.attention_mask.is_plain:
        return None

    def make() -> list[DeviceCall] | None:
        rows = VarlenRows.of(plan.queries, plan.keys, causal=plan.attention_mask.causal)
        return None if rows is None else list(_calls(rows, plan.heads, spec))

    return once(plan.shared, ("varlen", spec), make)


def _calls(rows: VarlenRows, heads: int, spec: InputSpec) -> Iterator[DeviceCall]:
    if not rows.sequences:
        return
    width = width_of(spec.head_dim, spec.value_dim)
    cudnn, library = choose(installed(spec.device), width)
    shared: dict[tuple[int, bool], list[VarlenSequence]] = {}
    for number, sequence in zip(rows.number, rows.sequences, strict=True):
        if cudnn is not None and SHAPES.is_worth(sequence, heads, width, spec.dtype):
            yield DeviceCall.of(rows.call([sequence]), cudnn, spec.device)
        else:
            shared.setdefault((number, sequence.causal), []).append(sequence)
    for sequences in shared.values():
        yield DeviceCall.of(rows.call(sequences), library, spec.device)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _rows(rows: np.ndarray, device: torch.device) -> slice | Tensor:
    if np.all(np.diff(rows) == 1):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return copy_to(torch.from_numpy(rows), device)


def _lengths(call: VarlenCall, device: torch.device) -> Lengths:
    sizes = np.array([(x.queries, x.keys) for x in call.sequences])
    # [2, sequences + 1], each row from 0 and contiguous
    starts = np.pad(sizes.T.cumsum(1), ((0, 0), (1, 0))).astype(np.int32, order="C")
    queries, keys = copy_to(torch.from_numpy(starts), device).unbind(0)
    return Lengths(queries=queries, keys=keys, most_queries=int(sizes[:, 0].max()), most_keys=int(sizes[:, 1].max()))


def forward(q: Tensor, k: Tensor, v: Tensor, calls: list[DeviceCall]) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.attention.attention_forward`; out comes in the dtype of q."""
    parts = (_forward(q, k, v, call) for call in calls)
    if len(calls) == 1 and calls[0].has_all(q):
        return next(parts)
    # Rows in no call see nothing; each other row is in one call.
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for call, found in zip(calls, parts, strict=True):
        for total, part in zip((out, lse), found, strict=True):
            if isinstance(call.queries, slice):
                total[call.queries] = part
            else:
                total.index_copy_(0, call.queries, part)
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, call: DeviceCall) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]`, in the dtype of q, and lse `[T, Hq]` of the call's rows."""
    of_rows = *call.of_queries(q), *call.of_keys(k, v)
    query, key, value = (fit(x, width_of(q.shape[2], v.shape[2])) for x in of_rows)
    out, lse = call.forward(query, key, value, scale=q.shape[2] ** -0.5)
    return out[..., : v.shape[2]].to(q.dtype), lse.t()  # [Hq, T] -> [T, Hq]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, calls: list[DeviceCall]
) -> Gradients:
    """See `farspan.kernels.attention.attention_backward`; gradients of several calls are summed in float32."""
    parts = (_backward(dout.to(q.dtype), q, k, v, out.to(q.dtype), lse, call) for call in calls)
    if len(calls) == 1 and calls[0].has_all(q, k):
        return next(parts)
    dtype = q.dtype if len(calls) == 1 else torch.float32
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
    for call, found in zip(calls, parts, strict=True):
        for total, rows, part in zip((dq, dk, dv), (call.queries, call.keys, call.keys), found, strict=True):
            if isinstance(rows, slice):
                total[rows].add_(part)
            else:
                # A row occurs once in a call, so that there is no order to sum in.
                total.index_add_(0, rows, part.to(dtype))
    return dq, dk, dv


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: DeviceCall) -> Gradients:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]` and dv `[S, Hk, Dv]` of the call's rows."""
    *of_queries, row_lse = call.of_queries(dout, q, out, lse)
    width = width_of(q.shape[2], v.shape[2])
    row_dout, query, row_out, key, value = (fit(x, width) for x in (*of_queries, *call.of_keys(k, v)))
    # lse [T, Hq] -> [Hq, T]
    given = row_dout, query, key, value, row_out, row_lse.t().contiguous()
    dq, dk, dv = call.backward(*given, scale=q.shape[2] ** -0.5)
    return dq[..., : q.shape[2]], dk[..., : k.shape[2]], dv[..., : v.shape[2]]

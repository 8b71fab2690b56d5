"""A recurrence over a whole sequence that one holder has, in any order of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import Segment, order
from farspan.kernels.masks.rows import Rows
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceScan:
    """Planned once for a sequence; serves every layer with the same rates.

    stretch: the rows, sorted. order: where each of them is found, None if they came sorted; inverse leads back.
    decay: the rates of the query heads held here, `[Hq]`.
    """

    segment: Segment
    order: Tensor | None
    inverse: Tensor | None
    decay: Tensor
    backend: str

    @staticmethod
    def build(rows: Rows, decay: Tensor, *, backend: str) -> "SequenceScan":
        """Plan a scan of `rows`, which hold all of their documents."""
        index = order(rows)
        if torch.equal(index, torch.arange(len(rows), device=index.device)):
            return SequenceScan(segment=Segment.of(rows), order=None, inverse=None, decay=decay, backend=backend)
        segment = Segment.of(rows.take(index))
        return SequenceScan(segment=segment, order=index, inverse=index.argsort(), decay=decay, backend=backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return out `[T, Hq, Dv]` in the dtype of q, rows in the order of q, and the tensors `backward` needs."""
        my_q, my_k, my_v = (_take(x, self.order) for x in (q, k, v))
        out, _ = recurrent_attention_forward(my_q, my_k, my_v, self.segment, self.decay, backend=self.backend)
        return _take(out, self.inverse).to(q.dtype), (q, k, v)

    def backward(self, dout: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv), rows in the order of q, in its dtype or wider."""
        dout, q, k, v = (_take(x, self.order) for x in (dout, *saved))
        gradients = recurrent_attention_backward(dout, None, q, k, v, self.segment, self.decay, backend=self.backend)
        dq, dk, dv = (_take(gradient, self.inverse) for gradient in gradients[:3])
        return dq, dk, dv


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index.to(x.device)]

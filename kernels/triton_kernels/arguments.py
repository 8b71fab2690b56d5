"""Arguments of the attention kernels besides plain tensors: tuples of pointers, where None is an absent term."""

from typing import NamedTuple

from torch import Tensor


class MaskTerms(NamedTuple):
    """The attention mask as columns of rows (T queries, S keys); int32.

    q_document `[T]`: -1 is padding. k_rank `[S]`: keys by document and position, and for each query the first and last
    rank that it attends to, one row for each distinct window, `[windows, T]`, with the window of each head `[Hq]`, and
    again for sinks, `[T]`. lifetime `[Hk, S]`: compared with q_position `[T]`. For a neighborhood, coordinates packed
    into one number with a guard bit above each: the least and the greatest (guards set) of each query `[T]` and those
    of each key `[S]`; and a class, `[T]` and `[S]`, which is equal where grid and residue of dilation are.
    """

    q_document: Tensor
    k_rank: Tensor
    window: Tensor
    q_first: Tensor
    q_last: Tensor
    q_first_sink: Tensor | None
    q_last_sink: Tensor | None
    q_position: Tensor | None
    lifetime: Tensor | None
    q_low: Tensor | None
    q_high: Tensor | None
    k_coordinates: Tensor | None
    guards: int | None
    q_class: Tensor | None
    k_class: Tensor | None


class Operand(NamedTuple):
    """A tensor `[rows, heads, width]` whose width has stride 1."""

    pointer: Tensor
    row_stride: int
    head_stride: int

    @staticmethod
    def of(x: Tensor) -> "Operand":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(2) == 1 else x.contiguous()
        return Operand(x, x.stride(0), x.stride(1))

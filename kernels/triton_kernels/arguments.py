"""What kernels are given besides tensors of rows: tuples of pointers, where None is a term that is absent."""

from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """Visibility, as columns of rows (T queries, S keys); int32.

    q_document `[T]`: -1 is padding. k_rank `[S]`, and of each query the first and last rank that it sees: near ones by
    the number of windows, `[windows, T]`, with the window of each head `[Hq]`; sinks `[T]`. Lifetimes `[Hk, S]` are
    compared with q_position `[T]`. Of a neighborhood, packed into one number with a guard bit above each coordinate:
    least and greatest (guards set) coordinates of each query `[T]`, coordinates of each key `[S]`; and a class `[T]`,
    `[S]`, which is equal where grid and residue of dilation are.
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
    k_place: Tensor | None
    guards: int | None
    q_class: Tensor | None
    k_class: Tensor | None


class Lists(NamedTuple):
    """The columns of `farspan.kernels.triton_kernels.block_mask.BlockMask`."""

    offsets: Tensor
    visits: Tensor
    entries: Tensor
    order: Tensor
    group: Tensor


class Operand(NamedTuple):
    """A tensor `[rows, heads, width]` whose width has stride 1."""

    pointer: Tensor
    row: int
    head: int

    @staticmethod
    def of(x: Tensor) -> "Operand":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(2) == 1 else x.contiguous()
        return Operand(x, x.stride(0), x.stride(1))

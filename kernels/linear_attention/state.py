"""State: what the rows of a stretch leave to the rows after it in a recurrence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.linear_attention.segment import NOWHERE, SequencePosition
from farspan.kernels.merge import accumulation_dtype


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The sum over the tokens j of the last document of exp(-s (P - position_j)) k_j v_j^T, at its last position P.

    value: `[Hq, D, Dv]` in the accumulation dtype. place: the document and P, which follow from the rows alone, so
    that only values have to be sent. Rows without a token leave value 0 at document -1: it changes no other state.
    """

    value: Tensor
    place: SequencePosition


def empty_state(heads: int, head_dim: int, value_dim: int, like: Tensor) -> State:
    """Return the state that no token has left."""
    dtype = accumulation_dtype(like.dtype)
    return State(torch.zeros(heads, head_dim, value_dim, dtype=dtype, device=like.device), NOWHERE)


def merge_states(earlier: State, later: State, decay: Tensor) -> State:
    """Return the state that two stretches, one after the other, leave together; decay: the rates s, `[Hq]`.

    Associative, with `empty_state` as its neutral element: LASP+ of MiniMax-01 (arXiv 2501.08313), with documents. One
    that ends before the later stretch does leaves nothing.
    """
    if later.place.document == NOWHERE.document:
        return earlier
    if earlier.place.document != later.place.document:
        return later
    return State(
        decayed(earlier.value, later.place.position - earlier.place.position, decay) + later.value, later.place
    )


def decayed(value: Tensor, distance: int, decay: Tensor) -> Tensor:
    """Return `value` `[Hq, D, Dv]` times exp(-s distance)."""
    if distance < 0:
        raise ValueError(f"a state decays forward only, not by {distance} positions: the later stretch comes second")
    return value * torch.exp(-distance * decay.double()).to(value)[:, None, None]

"""What routers did with the tokens of a rank, for losses that keep loads even and for the record."""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """Of one layer and this rank's tokens, padding left out; E experts, or heads, are chosen from.

    counts: tokens that chose each, int64 `[E]`, and dropped: for how many in vain, int64. shares: the sum over tokens
    of their scores as parts of 1, `[E]`. squares: the sum over tokens of the squared log-sum-exp of their logits.
    Gradients reach shares and squares.
    """

    counts: Tensor
    dropped: Tensor
    shares: Tensor
    squares: Tensor

    @staticmethod
    def of(
        chosen: Tensor, *, wanted: Tensor, kept: Tensor, shares: Tensor, logits: Tensor, real: Tensor
    ) -> "RoutingStatistics":
        """Sum over tokens: chosen int64 `[T, K]`, wanted and kept bool `[T, K]`, shares and logits `[T, E]`.

        wanted: which of the chosen are no padding; kept: which of these are not in vain. real: bool `[T]`.
        """
        counts = torch.zeros(shares.shape[1], dtype=torch.int64, device=shares.device)
        return RoutingStatistics(
            counts=counts.scatter_add_(0, chosen.flatten(), wanted.flatten().long()),
            dropped=(wanted & ~kept).sum(),
            shares=shares.masked_fill(~real[:, None], 0.0).sum(0),
            squares=logits.logsumexp(-1).square().masked_fill(~real, 0.0).sum(),
        )

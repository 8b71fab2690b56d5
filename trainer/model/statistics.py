"""Statistics of the routing of a rank's tokens, for load balancing losses and for the metrics."""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """Sums over this rank's tokens, padding left out, in one layer; tokens choose among E experts, or heads."""

    counts: Tensor
    """Tokens that chose each, int64 `[E]`."""
    dropped: Tensor
    """Choices that were dropped over capacity, int64 scalar."""
    shares: Tensor
    """Scores normalized to add up to 1 for each token, `[E]`; differentiable."""
    squares: Tensor
    """Squared log-sum-exp of the logits, scalar; differentiable."""

    @staticmethod
    def of(
        chosen: Tensor, *, wanted: Tensor, kept: Tensor, shares: Tensor, logits: Tensor, real: Tensor
    ) -> "RoutingStatistics":
        """Sum over tokens: chosen int64 `[T, K]`, wanted and kept bool `[T, K]`, shares and logits `[T, E]`.

        wanted: choices of tokens that are not padding. kept: those of them within capacity. real: bool `[T]`.
        """
        counts = torch.zeros(shares.shape[1], dtype=torch.int64, device=shares.device)
        return RoutingStatistics(
            counts=counts.scatter_add_(0, chosen.flatten(), wanted.flatten().long()),
            dropped=(wanted & ~kept).sum(),
            shares=shares.masked_fill(~real[:, None], 0.0).sum(0),
            squares=logits.logsumexp(-1).square().masked_fill(~real, 0.0).sum(),
        )

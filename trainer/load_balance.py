"""Load balancing of experts and of attention heads: auxiliary losses in the gradient, biases after each step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.comm import Channel
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.model.experts import ExpertFeedForward, RoutingStatistics
from farspan.trainer.model.head_mixture import HeadMixture


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """The loads of one step, over all ranks, on the CPU."""

    counts: Tensor
    """How often each expert was chosen in each layer, int64 `[layers, E]`."""
    dropped: Tensor
    """Choices beyond the capacity of experts in each layer, int64 `[layers]`."""
    balance_loss: float
    z_loss: float
    """As they were added to the loss, coefficients included."""
    bias: Tensor
    """`[layers, E]`, after the step."""

    def summary(self, kind: str) -> dict[str, Any]:
        """Return the metrics of a step, with names that begin with `kind`; layers with routers are numbered from 0.

        dropped: part of the choices. load: of the busiest over the mean. entropy: of the loads, 1 where they are even.
        bias: from the least to the greatest.
        """
        loads = self.counts.double()
        parts = loads / loads.sum(dim=1, keepdim=True).clamp(min=1)
        by_layer = {
            f"{kind}_dropped": self.dropped / self.counts.sum(dim=1).clamp(min=1),
            f"{kind}_load": loads.amax(dim=1) / loads.mean(dim=1).clamp(min=1),
            f"{kind}_entropy": -torch.xlogy(parts, parts).sum(dim=1) / math.log(max(loads.shape[1], 2)),
            f"{kind}_bias": self.bias.amax(dim=1) - self.bias.amin(dim=1),
        }
        tables = {
            name: {str(layer): value for layer, value in enumerate(values.tolist())}
            for name, values in by_layer.items()
        }
        return {f"{kind}_balance_loss": self.balance_loss, f"{kind}_z_loss": self.z_loss, **tables}


class ExpertBalance:
    """One step's auxiliary losses and loads; every rank makes the same calls.

    Balance loss (Switch, arXiv 2101.03961, eq. 4): E sum_i f_i P_i in each layer, f_i the part of all choices that fell
    on expert i and P_i its mean share; over the tokens of each sequence, the mean over sequences by their tokens. Over
    the step (arXiv 2501.11873) f is that of all sequences of the step so far, on all ranks, this micro-batch included.
    z-loss (ST-MoE, arXiv 2202.08906, eq. 5): the mean squared log-sum-exp of the logits. Layers add up.
    """

    def __init__(
        self, layers: Sequence[ExpertFeedForward] | Sequence[HeadMixture], context: Channel, tokens: int
    ) -> None:
        """layers: all of one kind. context: of the ranks that share a sequence. tokens: of the step, no padding."""
        self._config: ExpertsConfig | HeadMixtureConfig = layers[0].config
        self._layers, self._count = layers, layers[0].count
        self._context, self._tokens = context, tokens
        device = layers[0].bias.device
        self._counts = torch.zeros(len(layers), self._count, dtype=torch.int64, device=device)
        self._of_all_ranks = self._counts.clone()
        self._dropped = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)

    def loss(self, statistics: Sequence[RoutingStatistics]) -> Tensor:
        """Return this rank's part of the auxiliary losses of one micro-batch; ranks add up to the full loss."""
        config = self._config
        counts = torch.stack([layer.counts for layer in statistics])
        self._counts += counts
        self._dropped += torch.stack([layer.dropped for layer in statistics])
        squares = torch.stack([layer.squares for layer in statistics]).sum()
        z_loss = config.z_loss * squares / self._tokens
        if not config.balance_loss:
            self._losses[1] += z_loss.detach()
            return z_loss
        if config.balance_over == "step":
            dist.all_reduce(counts)
            self._of_all_ranks += counts
            counts = self._of_all_ranks
        else:
            counts = self._context.all_reduce(counts, kind="expert_load")
        shares = torch.stack([layer.shares for layer in statistics])
        # f_i = counts_i / choices; P_i = shares_i / tokens of the sequence, times these over the tokens of the step.
        fractions = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        balance = config.balance_loss * self._count / self._tokens * (fractions.to(shares.dtype) * shares).sum()
        self._losses += torch.stack((balance, z_loss)).detach()
        return balance + z_loss

    @torch.no_grad()
    def finish(self, *, is_update: bool) -> ExpertLoad:
        """Sum over all ranks; in an update, move each bias by `bias_rate` toward the mean load.

        See arXiv 2408.15664, algorithm 1.
        """
        for total in (self._counts, self._dropped, self._losses):
            dist.all_reduce(total)
        if is_update and self._config.bias_rate:
            for layer, counts in zip(self._layers, self._counts, strict=True):
                # In integers, so that a load that equals the mean moves nothing.
                below_mean = (counts.sum() - counts * len(counts)).sign()
                layer.bias.add_(below_mean.to(layer.bias.dtype), alpha=self._config.bias_rate)
        balance, z_loss = self._losses.tolist()
        bias = torch.stack([layer.bias for layer in self._layers]).float().cpu()
        return ExpertLoad(
            counts=self._counts.cpu(), dropped=self._dropped.cpu(), balance_loss=balance, z_loss=z_loss, bias=bias
        )

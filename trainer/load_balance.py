"""Load balancing of experts and of attention heads: auxiliary losses in the gradient, biases after each step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.parallel.comm import Channel
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, ModelConfig
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
    """float64 `[layers, E]`, after the step."""

    def summary(self, kind: str) -> dict[str, Any]:
        """Return the metrics of a step, with names that begin with `kind`; layers with routers are numbered from 0.

        dropped: part of the choices. load: of the busiest over the mean. entropy: of the loads, 1 where they are even.
        bias: from the least to the greatest.
        """
        # torch divides integers in float32.
        choices, candidates = self.counts.sum(dim=1).double().clamp(min=1), self.counts.shape[1]
        parts = self.counts / choices[:, None]
        by_layer = {
            f"{kind}_dropped": self.dropped / choices,
            f"{kind}_load": parts.amax(dim=1) * candidates,
            f"{kind}_entropy": -torch.xlogy(parts, parts).sum(dim=1) / math.log(max(candidates, 2)),
            f"{kind}_bias": self.bias.amax(dim=1) - self.bias.amin(dim=1),
        }
        tables = {
            name: {str(layer): value for layer, value in enumerate(values.tolist())}
            for name, values in by_layer.items()
        }
        return {f"{kind}_balance_loss": self.balance_loss, f"{kind}_z_loss": self.z_loss, **tables}


def spans_step(config: ExpertsConfig | HeadMixtureConfig) -> bool:
    """Return whether the balance loss of any token depends on the loads of the whole step."""
    return config.balance_loss > 0 and config.balance_over == "step"


def passes_ahead(model: ModelConfig, mechanisms: Sequence[Mechanism], micro_batches: int) -> int:
    """Return how many of a step's micro-batches run forward a first time, to count loads; mechanisms: of the layers."""
    of_experts = any(model.expert_layers) and spans_step(model.experts)
    of_heads = any(map(model.mixes_heads, mechanisms)) and spans_step(model.head_mixture)
    return micro_batches - 1 if of_experts or of_heads else 0


class ExpertBalance:
    """One step's auxiliary losses and loads; every rank makes the same calls.

    Balance loss (Switch, arXiv 2101.03961, eq. 4): E sum_i f_i P_i in each layer, f_i the part of all choices that fell
    on expert i and P_i its mean share; over the tokens of each sequence, the mean over sequences by their tokens. Over
    the step (arXiv 2501.11873) both are of all its tokens, on all ranks and in all micro-batches. Gradients flow
    through P_i only, which adds up over micro-batches; but the gradient of each takes f_i, so that later micro-batches
    have to be counted before the first backward pass.
    z-loss (ST-MoE, arXiv 2202.08906, eq. 5): the mean squared log-sum-exp of the logits. Layers add up.
    """

    def __init__(
        self, layers: Sequence[ExpertFeedForward] | Sequence[HeadMixture], context: Channel, tokens: int
    ) -> None:
        """layers: all of one kind. context: of the ranks that share a sequence. tokens: of the step, no padding."""
        self._config: ExpertsConfig | HeadMixtureConfig = layers[0].config
        self._layers, self._count = layers, layers[0].count
        self._context, self._tokens = context, max(tokens, 1)
        self.spans_step = spans_step(self._config)
        device = layers[0].bias.device
        self._counts = torch.zeros(len(layers), self._count, dtype=torch.int64, device=device)
        self._counts_ahead, self._counts_of_step = self._counts.clone(), None
        self._dropped = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)

    def count_ahead(self, statistics: Sequence[RoutingStatistics]) -> None:
        """Count a micro-batch whose `loss` comes later; all but the first, where the loss spans the step."""
        self._counts_ahead += torch.stack([layer.counts for layer in statistics])

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
        shares = torch.stack([layer.shares for layer in statistics])
        # f_i = counts_i / choices; P_i = shares_i / tokens of the sequence, times these over the tokens of the step.
        # In float64, as torch divides integers in float32.
        counts = self._counts_that_balance(counts).double()
        fractions = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        balance = config.balance_loss * self._count / self._tokens * (fractions.to(shares.dtype) * shares).sum()
        self._losses += torch.stack((balance, z_loss)).detach()
        return balance + z_loss

    def _counts_that_balance(self, counts: Tensor) -> Tensor:
        """Return the counts of a micro-batch's sequence or of the step, over all ranks, int64 `[layers, E]`."""
        if not self.spans_step:
            return self._context.all_reduce(counts, kind="expert_load")
        if self._counts_of_step is None:
            self._counts_of_step = self._counts_ahead + counts
            dist.all_reduce(self._counts_of_step)
        return self._counts_of_step

    @torch.no_grad()
    def finish(self, *, is_update: bool) -> ExpertLoad:
        """Sum over all ranks; in an update, move each bias by `bias_rate` toward the mean load.

        See arXiv 2408.15664, algorithm 1.
        """
        # In float64, which has all integers below 2^53: one sum over ranks, and one copy to the host.
        sums = torch.cat((self._counts.flatten().double(), self._dropped.double(), self._losses))
        dist.all_reduce(sums)
        sizes = self._counts.numel(), self._dropped.numel(), 2
        if is_update and self._config.bias_rate:
            of_layers = sums[: sizes[0]].view_as(self._counts).long()
            for layer, counts in zip(self._layers, of_layers, strict=True):
                # In integers, so that a load that equals the mean moves nothing.
                below_mean = (counts.sum() - counts * len(counts)).sign()
                layer.bias.add_(below_mean.to(layer.bias.dtype), alpha=self._config.bias_rate)
        bias = torch.stack([layer.bias for layer in self._layers]).double()  # [layers, E]
        numbers = torch.cat((sums, bias.flatten())).cpu()
        counts, dropped, losses, biases = numbers.split((*sizes, bias.numel()))
        return ExpertLoad(
            counts=counts.view(bias.shape).long(),
            dropped=dropped.long(),
            balance_loss=losses[0].item(),
            z_loss=losses[1].item(),
            bias=biases.view(bias.shape),
        )

"""Mixture of experts in place of a block's feed-forward: a router, experts of this and other ranks, a shared expert.

Legend: T local tokens, C width, E experts, K experts of a token, F inner size of an expert, N received rows.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.kernels.recomputation import kept
from farspan.kernels.routing.router_logits import routing_logits
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.eager import eager
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.expert_parallel.dispatch import send_to_experts
from farspan.trainer.model.config import ModelConfig


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

    @classmethod
    def of(
        cls, chosen: Tensor, *, wanted: Tensor, dispatched: Tensor, shares: Tensor, logits: Tensor, real: Tensor
    ) -> Self:
        """Sum over tokens: chosen int64 `[T, K]`, wanted and dispatched bool `[T, K]`, shares and logits `[T, E]`.

        wanted: choices of tokens that are not padding. dispatched: those of them within capacity. real: bool `[T]`.
        """
        counts = torch.zeros(shares.shape[1], dtype=torch.int64, device=shares.device)
        return cls(
            counts=counts.scatter_add_(0, chosen.flatten(), wanted.flatten().long()),
            dropped=(wanted & ~dispatched).sum(),
            shares=shares.masked_fill(~real[:, None], 0.0).sum(0),
            squares=logits.logsumexp(-1).square().masked_fill(~real, 0.0).sum(),
        )


class ExpertMatrices(nn.Module):
    """One matrix of each expert, `[E, out, in]`, sharded over the ranks of the expert mesh axis."""

    def __init__(self, experts: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, fan_out, fan_in))

    def local(self) -> Tensor:
        # FSDP gathers it over the data-parallel axis only: it is still a DTensor over the expert axis.
        weight: Tensor = self.weight
        return weight.to_local() if isinstance(weight, DTensor) else weight


class Experts(nn.Module):
    """SwiGLU by each of this rank's experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inner = config.experts.count, config.experts.feed_forward
        self.gate = ExpertMatrices(count, config.width, inner)
        self.up = ExpertMatrices(count, config.width, inner)
        self.down = ExpertMatrices(count, inner, config.width)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[N, C] -> [N, C]`; rows are sorted by expert, `counts`, int64 `[E/P]`, says how many each has."""
        return grouped_swiglu(rows, self.gate.local(), self.up.local(), self.down.local(), counts)


class ExpertFeedForward(nn.Module):
    """The weighted sum of the chosen experts' outputs for each token, plus the shared expert's."""

    def __init__(self, config: ModelConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.config, self.choice, self.count = config.experts, config.experts.build_router(), config.experts.count
        self.router = nn.Linear(config.width, self.count, bias=False)
        self.experts = Experts(config)
        self.shared = shared
        self.bias = nn.Buffer(torch.empty(self.count))

    @eager
    def begin(
        self, x: Tensor, sequence: ExpertCapacity, channel: Channel
    ) -> Callable[[], tuple[Tensor, RoutingStatistics]]:
        """Send x `[T, C]` to the ranks of its experts; return a function that waits for their results `[T, C]`.

        The caller computes attention in between, so that it overlaps the exchange.
        """
        real = sequence.index >= 0
        logits = routing_logits(x, self.router.weight)  # [T, E]
        scores = self.choice.scores(logits)
        chosen, wanted = kept(lambda: self._choose(scores, sequence))  # [T, K]
        weights, dispatched = self.choice.weights(scores, chosen), wanted
        if factor := self.config.capacity:
            drop = self.config.drop
            dispatched = kept(lambda: sequence.within_capacity(chosen, weights, self.count, factor, drop))
        ragged = self.config.choice == "experts"
        under_way = send_to_experts(x, chosen, weights, dispatched, channel, self.count, ragged=ragged)
        shares = self.choice.shares(scores)
        statistics = RoutingStatistics.of(
            chosen, wanted=wanted, dispatched=dispatched, shares=shares, logits=logits, real=real
        )

        def finish() -> tuple[Tensor, RoutingStatistics]:
            shared = None if self.shared is None else self.shared(x)
            out = under_way.combine(self.experts)
            return out if shared is None else out + shared, statistics

        return finish

    @torch.no_grad()
    def _choose(self, scores: Tensor, sequence: ExpertCapacity) -> tuple[Tensor, Tensor]:
        """Return experts of each token, int64 `[T, K]`, and a mask of the entries that are choices, bool `[T, K]`."""
        if self.config.choice == "experts":
            taken = sequence.chosen_by_experts(scores, self.config.per_token)  # [T, E]
            # All experts, as any number of them may take a token: a stable sort puts takers first, K = E.
            chosen = (~taken).byte().argsort(dim=1, stable=True)
            return chosen, taken.gather(1, chosen)
        chosen = self.choice.choose(scores, self.bias)  # [T, K]
        return chosen, (sequence.index >= 0)[:, None].expand_as(chosen)

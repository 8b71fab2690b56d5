"""Choices of experts that depend on the full sequence: the capacity of an expert, and experts that choose tokens.

All ranks that share a sequence all-gather what the choice depends on, token indices, expert numbers and scores but no
hidden states, and compute the same choice: it does not depend on the layout. A rank sends (P-1) times what it holds.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from farspan.kernels.routing.ranking import rank_in_group
from farspan.parallel.comm import Channel

LARGEST_DENOMINATOR = 10**9
"""Of a capacity factor: nine decimals; tokens times its numerator fit into an int64."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCapacity:
    """channel: the ranks that share a sequence. index: its token behind each local row, `[T]`; -1 if padding."""

    channel: Channel
    index: Tensor

    def within_capacity(
        self, chosen: Tensor, weights: Tensor, experts: int, factor: float, drop: Literal["weight", "position"]
    ) -> Tensor:
        """Return which choices `[T, K]` of real tokens fall within the capacity of their experts, bool `[T, K]`.

        An expert takes factor x tokens x K / experts of a sequence, rounded up (Switch, arXiv 2101.03961, eq. 3): those
        with the highest weights, or the first ones.
        """
        per_token = chosen.shape[1]
        index = self._all_gather(self.index)  # [P * T]
        # Padding chooses an expert of its own, number `experts`.
        global_chosen = self._all_gather(chosen).masked_fill(index[:, None] < 0, experts)  # [P * T, K]
        if drop == "weight":
            scores = self._all_gather(weights.detach().float())
        else:
            # Equal scores: ties are broken by the order of the sequence.
            scores = torch.zeros_like(global_chosen).float()
        order = index.argsort()
        rank = rank_in_group(scores[order].view(-1, 1), global_chosen[order].flatten())  # [P * T * K, 1]
        # In integers, by the decimal number that was asked for: 1.1 x 100 is a little more than 110 in float64.
        share = Fraction(factor).limit_denominator(LARGEST_DENOMINATOR) * per_token / experts
        capacity = -((index >= 0).sum() * -share.numerator // share.denominator)
        dispatched = torch.empty_like(global_chosen, dtype=torch.bool)
        dispatched[order] = (rank < capacity).view(-1, per_token) & (index[order] >= 0)[:, None]  # [P * T, K]
        return self._local(dispatched)

    def chosen_by_experts(self, scores: Tensor, per_token: int) -> Tensor:
        """Return which tokens each expert takes by scores `[T, E]`, bool `[T, E]`; ties go to earlier tokens.

        Each takes tokens x per_token / E of a sequence, rounded up (expert choice, arXiv 2202.09368, section 3.2).
        """
        index, global_scores = self._all_gather(self.index), self._all_gather(scores.detach().float())  # [P * T, E]
        order = index.argsort()
        # Padding is ranked in a group of its own, so that it takes no capacity.
        rank = rank_in_group(global_scores[order], (index[order] < 0).long())
        capacity = torch.ceil((index >= 0).sum().double() * per_token / scores.shape[1])
        taken = torch.empty_like(global_scores, dtype=torch.bool)
        taken[order] = (rank < capacity) & (index[order] >= 0)[:, None]
        return self._local(taken)

    def _all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.channel.all_gather(x, kind="expert_capacity"))  # P x [T, ...] -> [P * T, ...]

    def _local(self, x: Tensor) -> Tensor:
        return x.view(self.channel.size, -1, *x.shape[1:])[self.channel.rank]  # [P * T, ...] -> [P, T, ...] -> [T, ...]

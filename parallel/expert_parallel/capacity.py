"""Choices that need the whole sequence: experts that take so many of its tokens and no more.

All ranks that share a sequence gather what is needed to choose, numbers of tokens and scores and never hidden states,
and choose alike: however tokens are dealt, the same ones are taken. A rank sends (P-1) times what it has.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farspan.kernels.routing.ranking import rank_in_group
from farspan.parallel.comm import Channel


@dataclass(frozen=True, slots=True, eq=False)
class SharedSequence:
    """channel: of the ranks that share a sequence. index: its token behind each local row, `[T]`; -1 if padding."""

    channel: Channel
    index: Tensor

    def within_capacity(
        self, chosen: Tensor, weights: Tensor, experts: int, factor: float, drop: Literal["weight", "position"]
    ) -> Tensor:
        """Return which choices `[T, K]` of real tokens fall within the capacity of their experts, bool `[T, K]`.

        An expert takes factor x tokens x K / experts of a sequence, rounded up (Switch, arXiv 2101.03961, eq. 3): those
        of the highest weights, or the first ones.
        """
        per_token = chosen.shape[1]
        index = self._of_all(self.index)
        global_rows = self._of_all(chosen).masked_fill(index[:, None] < 0, experts)
        scores = self._of_all(weights.detach().float()) if drop == "weight" else torch.zeros_like(global_rows).float()
        order = index.argsort()
        rank = rank_in_group(scores[order].view(-1, 1), global_rows[order].flatten())
        capacity = torch.ceil(factor * (index >= 0).sum().double() * per_token / experts)
        kept = torch.empty_like(global_rows, dtype=torch.bool)
        kept[order] = (rank < capacity).view(-1, per_token) & (index[order] >= 0)[:, None]
        return self._mine(kept)

    def chosen_by_experts(self, scores: Tensor, per_token: int) -> Tensor:
        """Return which tokens each expert takes, bool `[T, E]`, of scores `[T, E]`: the highest, earlier ones in a tie.

        Each takes tokens x per_token / E of a sequence, rounded up (expert choice, arXiv 2202.09368, section 3.2).
        """
        index, global_rows = self._of_all(self.index), self._of_all(scores.detach().float())
        order = index.argsort()
        rank = rank_in_group(global_rows[order], (index[order] < 0).long())
        capacity = torch.ceil((index >= 0).sum().double() * per_token / scores.shape[1])
        taken = torch.empty_like(global_rows, dtype=torch.bool)
        taken[order] = (rank < capacity) & (index[order] >= 0)[:, None]
        return self._mine(taken)

    def _of_all(self, x: Tensor) -> Tensor:
        return torch.cat(self.channel.all_gather(x, kind="expert_capacity"))

    def _mine(self, x: Tensor) -> Tensor:
        return x.view(self.channel.size, -1, *x.shape[1:])[self.channel.rank]

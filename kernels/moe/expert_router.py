"""Routers of experts: from a token's logits to its experts and their weights.

Logits are float32 (float64 for float64 inputs) in any dtype of the model. Softmax scores that are normalized over the
chosen experts are the softmax of the chosen logits: one setting covers both.

Legend: T tokens, E experts, K experts of a token, G groups of neighboring experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farspan.kernels.routing.ranking import top


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRouter:
    """Token choice: each token takes its `per_token` best of `experts` experts; the lower number wins a tie.

    score: softmax over all experts, or sigmoid of each (DeepSeek-V3, arXiv 2412.19437, eq. 15). normalized: weights of
    the chosen experts are divided by their sum. scale: a factor of the weights. groups, groups_per_token: experts are
    chosen from the best groups only. group_score_top_k: how many of a group's best experts add up to its score. 0 is
    per_token / groups_per_token, at least 1 (arXiv 2412.19437, section 2.1.2); the code of that paper's model takes 2
    whatever these are, DeepSeek-V2 (arXiv 2405.04434, section 2.2.2) 1. Raises ValueError where these do not fit.
    """

    experts: int
    per_token: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    group_score_top_k: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise ValueError(f"per_token={self.per_token} must be from 1 to experts={self.experts}")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"groups={self.groups} must divide experts={self.experts}")
        if not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} must be from 1 to groups={self.groups}")
        if self.per_token > self.groups_per_token * (self.experts // self.groups):
            raise ValueError(
                f"groups_per_token={self.groups_per_token} groups of {self.experts // self.groups} experts are fewer "
                f"than per_token={self.per_token}"
            )
        if not 0 <= self.group_score_top_k <= self.experts // self.groups:
            raise ValueError(
                f"group_score_top_k={self.group_score_top_k} must be from 0 to {self.experts // self.groups}, the "
                "experts of a group"
            )

    def scores(self, logits: Tensor) -> Tensor:
        """Return the score of each expert `[T, E]`, from logits `[T, E]`."""
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    @torch.no_grad()
    def choose(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Return the experts of each token, int64 `[T, K]`, best first.

        bias `[E]` counts in the choice only, not in the weights (arXiv 2408.15664).
        """
        # A NaN whose sign is set ranks below -inf: its token would get no experts.
        scores = (scores.float() + bias.float()).nan_to_num(nan=float("inf"))
        if self.groups_per_token < self.groups:
            scores = scores.masked_fill(~self._of_best_groups(scores), float("-inf"))
        return top(scores, self.per_token)

    def _of_best_groups(self, scores: Tensor) -> Tensor:
        # [T, E] -> [T, G, E/G]
        grouped = scores.unflatten(-1, (self.groups, -1))
        counted = self.group_score_top_k or max(self.per_token // self.groups_per_token, 1)
        best = top(grouped.topk(counted, dim=-1).values.sum(-1), self.groups_per_token)
        # [T, G] -> [T, G, E/G] -> [T, E]
        chosen = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
        return chosen.unsqueeze(-1).expand_as(grouped).flatten(-2)

    def weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return the weight of each chosen expert, `[T, K]`, differentiable."""
        # [T, E] -> [T, K]
        weights = scores.gather(-1, chosen)
        return (weights / total_of(weights) if self.normalized else weights) * self.scale

    def shares(self, scores: Tensor) -> Tensor:
        """Return scores that add up to 1 for each token, `[T, E]`, for balance losses."""
        return scores if self.score == "softmax" else scores / total_of(scores)


def total_of(scores: Tensor) -> Tensor:
    """Return the sum of the last dimension, `[..., 1]`, to divide scores by: above 0 where all of them underflow."""
    # Sigmoids underflow, and so does the softmax of experts, or heads, that a bias has chosen.
    return scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

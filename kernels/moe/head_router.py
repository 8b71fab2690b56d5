"""Routers of attention heads: from a token's logits to the heads that it works with and their weights.

Two kinds, both with float32 logits (float64 for float64 inputs). All tokens have the same number of query heads for
each KV head, so attention runs with that many heads under any mechanism and strategy. Heads that no token selects are
skipped.

Legend: T tokens, Hk KV heads, G query heads of each.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.moe.expert_router import total_of
from farspan.kernels.recomputation import kept
from farspan.kernels.routing.ranking import top


class ChosenHeads(NamedTuple):
    """indices: the head or expert in each slot of a token, int64 `[T, slots]`; gates: its weight, differentiable.

    chosen: the chosen ones among the candidates, ascending, int64 `[T, chosen]`; shares: scores of the candidates that
    add up to 1, `[T, candidates]`, for balance losses.
    """

    indices: Tensor
    gates: Tensor
    chosen: Tensor
    shares: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionExperts:
    """Experts with queries and an output of their own (mixture of attention heads, arXiv 2210.05144).

    Of `count` experts a token takes the `per_token` with the highest softmax; the lower number wins a tie. Their
    weights are the softmax or, if `normalized`, that divided by its sum over the chosen, through which no gradient
    flows. With all experts chosen it is the soft routing of BAM (arXiv 2408.08274). Raises ValueError where these do
    not fit.
    """

    count: int
    per_token: int
    normalized: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"per_token={self.per_token} must be from 1 to count={self.count}")

    @property
    def logits(self) -> int:
        """Logits of each token."""
        return self.count

    @property
    def choices(self) -> int:
        """Candidates of each token."""
        return self.count

    def choose(self, logits: Tensor, bias: Tensor) -> ChosenHeads:
        """Choose experts by logits `[T, count]`; bias `[count]` counts in the choice only."""
        shares = logits.softmax(-1)
        chosen = kept(lambda: self._best(shares.detach(), bias))
        gates = shares.gather(1, chosen)
        if self.normalized:
            gates = gates / total_of(gates.detach())
        return ChosenHeads(indices=chosen, gates=gates, chosen=chosen, shares=shares)

    def _best(self, shares: Tensor, bias: Tensor) -> Tensor:
        return top(shares.float() + bias.float(), self.per_token).sort(dim=1).values


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureOfHeads:
    """Heads of which each token works with some (MoH, arXiv 2410.11842, in the scaling of its code).

    Each of `kv_heads` KV heads has G query heads: the first `shared` of them work on every token, and the `per_token`
    others with the highest softmax. The paper chooses among the heads of all groups at once, which is the same for one
    KV head. With p the softmax over all candidates, S shared and K chosen heads in all:

        shared head i   2 softmax(W_h x)_1  S softmax(W_s x)_i
        chosen head i   2 softmax(W_h x)_2  K p_i / (sum of p over the chosen)

    and without shared heads K p_i / (sum of p over the chosen): gates are 1 on average. Logits are those of the
    candidates, group by group, then W_s x, then W_h x. Where S is 1, W_s has no effect and no gradient; where K is 1,
    neither have the logits of candidates beyond the choice. Raises ValueError where these do not fit.
    """

    kv_heads: int
    group: int
    shared: int
    per_token: int

    def __post_init__(self) -> None:
        if not 0 <= self.shared < self.group:
            raise ValueError(
                f"shared={self.shared} must be less than the {self.group} query heads of each KV head, which would "
                "leave none to choose from"
            )
        if not 1 <= self.per_token <= self.group - self.shared:
            raise ValueError(
                f"per_token={self.per_token} must be from 1 to {self.group - self.shared}, the query heads of each KV "
                f"head that are not shared"
            )

    @property
    def logits(self) -> int:
        """Logits of each token."""
        return self.choices + (self.kv_heads * self.shared + 2 if self.shared else 0)

    @property
    def choices(self) -> int:
        """Candidates of each token: all heads that are not shared."""
        return self.kv_heads * (self.group - self.shared)

    def choose(self, logits: Tensor, bias: Tensor) -> ChosenHeads:
        """Choose heads by logits `[T, self.logits]`; bias `[choices]` counts in the choice only.

        Slots are those of each KV head in turn, the shared ones first.
        """
        shares = logits[:, : self.choices].softmax(-1)
        chosen, indices = kept(lambda: self._best(shares.detach(), bias))
        # Divided by their sum, so that the gates of a token's chosen heads are 1 on average.
        gates = shares.gather(1, chosen)
        gates = gates / total_of(gates) * chosen.shape[1]
        # [T, Hk * per_token] -> [T, Hk, per_token]
        gates = gates.unflatten(1, (self.kv_heads, -1))
        if self.shared:
            of_shared, between = logits[:, self.choices : -2].softmax(-1), 2 * logits[:, -2:].softmax(-1)
            of_shared = (of_shared * of_shared.shape[1]).unflatten(1, (self.kv_heads, -1))
            # [T, Hk, shared + per_token]
            gates = torch.cat((of_shared * between[:, :1, None], gates * between[:, 1:, None]), dim=2)
        return ChosenHeads(indices=indices, gates=gates.flatten(1), chosen=chosen, shares=shares)

    def _best(self, shares: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen candidates `[T, Hk * per_token]` and the heads in all slots of a token `[T, slots]`."""
        # [T, Hk * candidates] -> [T, Hk, candidates of a KV head]
        scores = (shares.float() + bias.float()).unflatten(1, (self.kv_heads, -1))
        in_group = top(scores, self.per_token).sort(dim=2).values  # [T, Hk, per_token]
        first = torch.arange(self.kv_heads, device=shares.device).view(-1, 1)
        always = torch.arange(self.shared, device=shares.device).expand(*in_group.shape[:2], -1)
        # [T, Hk, shared + per_token]
        indices = torch.cat((always, in_group + self.shared), dim=2) + first * self.group
        # [T, Hk, per_token] -> [T, Hk * per_token], numbered over all candidates
        return (in_group + first * (self.group - self.shared)).flatten(1), indices.flatten(1)

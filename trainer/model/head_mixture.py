"""Mixtures of attention heads: each token chooses whose queries and outputs it uses.

Any mechanism attends with the chosen heads, under any strategy, as if the layer had only that many. Experts and heads
that no token selects are skipped: no query, no attention, no output.

Legend: T local tokens, C width, E experts or single heads (MoH's experts), N of which a token takes, D head dim,
Hk KV heads.
"""

import torch
from torch import Tensor, nn

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.moe.gathered_linear import Choices, combine_chosen, project_chosen
from farspan.kernels.recomputation import kept
from farspan.kernels.routing.router_logits import routing_logits
from farspan.parallel.context_parallel.eager import eager
from farspan.trainer.model.attention import Attention, AttentionInputs
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.experts import RoutingStatistics


class HeadMixture(Attention):
    """Attention with the heads that each token chose; gates scale their outputs before the output matrix."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__(config, mechanism)
        choice = config.build_head_router()
        assert choice is not None
        of_experts, self.config = config.head_mixture.kind == "experts", config.head_mixture
        self.choice, self.count = choice, choice.choices
        self.experts = config.head_mixture.count if of_experts else config.heads
        # Attention wants queries in the order of KV heads. Experts that share keys and values come in another order:
        # each has some queries of every KV head.
        self.shared_kv_heads = config.kv_heads if of_experts and not config.head_mixture.own_keys else None
        self.head_router = nn.Linear(config.width, choice.logits, bias=False)
        self.bias = nn.Buffer(torch.empty(choice.choices))

    @eager
    def forward(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, RoutingStatistics]:
        logits = routing_logits(x, self.head_router.weight)  # [T, logits]
        heads = self.choice.choose(logits, self.bias)
        if heads.indices.shape[1] == self.experts:
            # All are chosen: plain projections, with the gates in the order of the experts.
            gates = torch.zeros_like(heads.gates).scatter(1, heads.indices, heads.gates)  # [T, N = E]
            q = self.query(x).unflatten(1, (self.experts, -1))  # [T, E * heads * D] -> [T, E, heads * D]
            out = self.out(self._gated_outputs(q, gates, x, inputs).flatten(1))  # [T, E * heads * D] -> [T, C]
        else:
            choices = kept(lambda: Choices.of(heads.indices, self.experts))
            # [E * heads * D, C] -> [E, heads * D, C]; q [T, N, heads * D]
            q = project_chosen(x, self.query.weight.unflatten(0, (self.experts, -1)), choices)
            weight = self.out.weight.unflatten(1, (self.experts, -1)).transpose(0, 1)  # [C, E, ..] -> [E, C, heads * D]
            out = combine_chosen(self._gated_outputs(q, heads.gates, x, inputs), weight, choices)  # [T, C]
        wanted = inputs.real[:, None].expand_as(heads.chosen)
        return out, RoutingStatistics.of(
            heads.chosen,
            wanted=wanted,
            dispatched=wanted,
            shares=heads.shares,
            logits=logits[:, : self.count],
            real=inputs.real,
        )

    def _gated_outputs(self, q: Tensor, gates: Tensor, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return the gated outputs of the queries q, both `[T, N, heads * D]`; gates `[T, N]`."""
        kv_heads, chosen = self.shared_kv_heads, q.shape[1]
        if kv_heads is None:
            heads = q.unflatten(2, (-1, self.head_dim)).flatten(1, 2)  # [T, N, heads * D] -> [T, N * heads, D]
            out = self.head_outputs(heads, x, inputs).unflatten(1, (chosen, -1))  # [T, N, heads, D]
        else:
            # [T, N, heads * D] -> [T, N, Hk, heads / Hk, D] -> [T, Hk, N, heads / Hk, D], and back
            by_kv_head = q.unflatten(2, (kv_heads, -1, self.head_dim)).transpose(1, 2)
            out = self.head_outputs(by_kv_head.flatten(1, 3), x, inputs)  # [T, N * heads, D]
            out = out.unflatten(1, (kv_heads, chosen, -1)).transpose(1, 2)
        return (out.flatten(2) * gates.unsqueeze(-1)).to(q.dtype)

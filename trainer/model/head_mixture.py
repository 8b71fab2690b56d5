"""Mixtures of attention heads: each token chooses whose queries and outputs it uses.

Any mechanism attends with what was chosen, under any strategy, as if the layer had that many heads. What nobody chose
is not computed: no query, no attention, no output.

Legend: T local tokens, C width, U units of heads, that is experts or single heads, N of which a token takes, D head
size.
"""

import torch
from torch import Tensor, nn

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.moe.gathered_linear import Choices, combine_chosen, project_chosen
from farspan.kernels.routing.router_logits import routing_logits
from farspan.trainer.model.attention import Attention, AttentionInputs
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.statistics import RoutingStatistics


class HeadMixture(Attention):
    """Attention with the heads that each token chose; their outputs are weighed before the output matrix."""

    def __init__(self, config: ModelConfig, mechanism: Mechanism) -> None:
        super().__init__(config, mechanism)
        choice = config.build_head_router()
        assert choice is not None
        of_experts, self.config = config.head_mixture.kind == "experts", config.head_mixture
        self.choice, self.count = choice, choice.choices
        self.units = config.head_mixture.count if of_experts else config.heads
        # Experts that share keys and values have some queries of each KV head; all else is in the order of KV heads.
        self.shared_kv_heads = config.kv_heads if of_experts and not config.head_mixture.own_keys else None
        self.head_router = nn.Linear(config.width, choice.logits, bias=False)
        self.bias = nn.Buffer(torch.empty(choice.choices))

    def mix(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, RoutingStatistics]:
        """Return `[T, C]` of x `[T, C]`, and what was chosen."""
        logits = routing_logits(x, self.head_router.weight)
        heads = self.choice.choose(logits, self.bias)
        if heads.indices.shape[1] == self.units:
            gates = torch.zeros_like(heads.gates).scatter(1, heads.indices, heads.gates)
            out = self.out(self._attend(self.query(x).unflatten(1, (self.units, -1)), gates, x, inputs).flatten(1))
        else:
            choices = Choices.of(heads.indices, self.units)
            q = project_chosen(x, self.query.weight.unflatten(0, (self.units, -1)), choices)
            weight = self.out.weight.unflatten(1, (self.units, -1)).transpose(0, 1)  # [U, C, heads * D]
            out = combine_chosen(self._attend(q, heads.gates, x, inputs), weight, choices)
        wanted = inputs.real[:, None].expand_as(heads.chosen)
        return out, RoutingStatistics.of(
            heads.chosen,
            wanted=wanted,
            kept=wanted,
            shares=heads.shares,
            logits=logits[:, : self.count],
            real=inputs.real,
        )

    def _attend(self, q: Tensor, gates: Tensor, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return the weighed output of queries of units, both `[T, N, heads * D]`, gates `[T, N]`."""
        kv_heads, units = self.shared_kv_heads, q.shape[1]
        if kv_heads is None:
            heads = q.unflatten(2, (-1, self.head_dim)).flatten(1, 2)
            out = self.attend(heads, x, inputs).unflatten(1, (units, -1))
        else:
            by_kv_head = q.unflatten(2, (kv_heads, -1, self.head_dim)).transpose(1, 2)  # [T, Hk, N, heads / Hk, D]
            out = self.attend(by_kv_head.flatten(1, 3), x, inputs).unflatten(1, (kv_heads, units, -1)).transpose(1, 2)
        return (out.flatten(2) * gates.unsqueeze(-1)).to(q.dtype)

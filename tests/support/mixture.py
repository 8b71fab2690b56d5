"""Mixtures by their formulas, in float64 on one full sequence: every expert, and every head, computes every token."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.trainer.model.config import ExpertsConfig, ModelConfig


@dataclass(frozen=True)
class Seen:
    """The logits of a sequence's routers, by layer: of experts, and of attention heads those that choose."""

    experts: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)


def scores_of(experts: ExpertsConfig, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if experts.score == "softmax" else logits.sigmoid()


def weights_of(experts: ExpertsConfig, logits: Tensor, wanted: Tensor) -> Tensor:
    """Of all experts, `[T, E]`; 0 where not wanted."""
    weights = scores_of(experts, logits) * wanted
    if experts.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * experts.scale


def choices(experts: ExpertsConfig, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts are chosen for each token and which of these compute it, bool `[T, E]`; no groups."""
    scores, tokens = scores_of(experts, logits).detach(), len(logits)
    if experts.choice == "experts":
        taken = torch.zeros(scores.shape, dtype=torch.bool)
        # Tokens that begin documents with the same byte are equal in the first layer: the earlier one wins.
        best = scores.float().sort(dim=0, descending=True, stable=True).indices
        taken.scatter_(0, best[: math.ceil(tokens * experts.per_token / experts.count)], True)
        return taken, taken
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    wanted.scatter_(1, (scores.float() + bias.float()).topk(experts.per_token, dim=-1).indices, True)
    if not experts.capacity:
        return wanted, wanted
    within = torch.zeros_like(wanted)
    capacity = math.ceil(experts.capacity * tokens * experts.per_token / experts.count)
    weights = weights_of(experts, logits, wanted).detach().float()
    for expert in range(experts.count):
        line = wanted[:, expert].nonzero().flatten().tolist()
        if experts.drop == "weight":
            line.sort(key=lambda token: (-weights[token, expert].item(), token))
        within[line[:capacity], expert] = True
    return wanted, within


def mixed(p: dict[str, Tensor], name: str, experts: ExpertsConfig, x: Tensor, seen: Seen) -> Tensor:
    """Expert parameters are `[E, out, in]`, the bias a buffer; `seen` gets the logits."""
    logits = x @ p[name + "router.weight"].T
    seen.experts.append(logits)
    wanted, within = choices(experts, logits, p[name + "bias"])
    weights = weights_of(experts, logits, wanted) * within
    gate, up, down = (p[f"{name}experts.{part}.weight"] for part in ("gate", "up", "down"))
    inner = F.silu(torch.einsum("tc,efc->tef", x, gate)) * torch.einsum("tc,efc->tef", x, up)
    out = torch.einsum("te,tef,ecf->tc", weights, inner, down)
    if experts.shared:
        gate, up = (x @ p[f"{name}shared.{part}.weight"].T for part in ("gate", "up"))
        out = out + (F.silu(gate) * up) @ p[name + "shared.down.weight"].T
    return out


def head_choices(model: ModelConfig, logits: Tensor, bias: Tensor) -> Tensor:
    """Which experts, or heads that are not shared, each token chose, bool `[T, choices]`."""
    mixture, scores = model.head_mixture, logits.softmax(-1).detach().float() + bias.float()
    groups = model.kv_heads if mixture.kind == "heads" else 1
    chosen = torch.zeros(scores.shape, dtype=torch.bool).unflatten(1, (groups, -1))
    chosen.scatter_(2, scores.unflatten(1, (groups, -1)).topk(mixture.per_token, dim=-1).indices, True)
    return chosen.flatten(1)


def head_gates(model: ModelConfig, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of all heads that have matrices `[T, heads]`, 0 for those not chosen; and the logits that choose."""
    mixture = model.head_mixture
    if mixture.kind == "experts":
        gates = logits.softmax(-1) * head_choices(model, logits, bias)
        if mixture.normalized:
            gates = gates / gates.detach().sum(-1, keepdim=True)
        return gates.repeat_interleave(model.heads, dim=1), logits
    group, shared = model.heads // model.kv_heads, mixture.shared
    among = model.kv_heads * (group - shared)
    chosen = head_choices(model, logits[:, :among], bias)
    routed = logits[:, :among].softmax(-1) * chosen
    routed = routed / routed.sum(-1, keepdim=True) * model.kv_heads * mixture.per_token
    if not shared:
        return routed, logits[:, :among]
    between = 2 * logits[:, -2:].softmax(-1)
    always = logits[:, among:-2].softmax(-1) * model.kv_heads * shared
    parts = (part.unflatten(1, (model.kv_heads, -1)) for part in (always * between[:, :1], routed * between[:, 1:]))
    return torch.cat(tuple(parts), dim=2).flatten(1), logits[:, :among]

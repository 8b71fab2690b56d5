"""A mixture of experts by its formulas, in float64 on one whole sequence: every expert computes every token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.trainer.model.config import ExpertsConfig


def scores_of(experts: ExpertsConfig, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if experts.score == "softmax" else logits.sigmoid()


def weights_of(experts: ExpertsConfig, logits: Tensor, wanted: Tensor) -> Tensor:
    """Of all experts, `[T, E]`; 0 for those that are not wanted."""
    weights = scores_of(experts, logits) * wanted
    if experts.normalised:
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
    kept = torch.zeros_like(wanted)
    capacity = math.ceil(experts.capacity * tokens * experts.per_token / experts.count)
    weights = weights_of(experts, logits, wanted).detach().float()
    for expert in range(experts.count):
        line = wanted[:, expert].nonzero().flatten().tolist()
        if experts.drop == "weight":
            line.sort(key=lambda token: (-weights[token, expert].item(), token))
        kept[line[:capacity], expert] = True
    return wanted, kept


def mixed(p: dict[str, Tensor], name: str, experts: ExpertsConfig, x: Tensor, seen: list[Tensor]) -> Tensor:
    """Expert parameters are `[E, out, in]`, the bias a buffer; `seen` gets the logits."""
    logits = x @ p[name + "router.weight"].T
    seen.append(logits)
    wanted, kept = choices(experts, logits, p[name + "bias"])
    weights = weights_of(experts, logits, wanted) * kept
    gate, up, down = (p[f"{name}experts.{part}.weight"] for part in ("gate", "up", "down"))
    inner = F.silu(torch.einsum("tc,efc->tef", x, gate)) * torch.einsum("tc,efc->tef", x, up)
    out = torch.einsum("te,tef,ecf->tc", weights, inner, down)
    if experts.shared:
        gate, up = (x @ p[f"{name}shared.{part}.weight"].T for part in ("gate", "up"))
        out = out + (F.silu(gate) * up) @ p[name + "shared.down.weight"].T
    return out

"""The gated recurrence of MiniMax-01 by its formulas, in float64 on one whole sequence: decays are one matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.trainer.model.config import ModelConfig


def gated_recurrence(
    p: dict[str, Tensor], name: str, model: ModelConfig, x: Tensor, position: Tensor, visible: Tensor
) -> Tensor:
    """x `[T, C]`; visible `[T, S]`: of the same document, and not later. The layer's number is in its name."""
    layer = int(name.split(".")[1])
    q, k, v = (
        F.silu(x @ p[f"{name}{part}.weight"].T).unflatten(-1, (model.heads, model.head_dim))
        for part in ("query", "key", "value")
    )
    slower = 1 - layer / (model.layers - 1 + 1e-5) + 1e-5
    slopes = [2 ** (-8 * (head + 1) / model.heads) * slower for head in range(model.heads)]
    age = (position[:, None] - position[None]).clamp(min=0)
    weights = torch.exp(-torch.tensor(slopes, dtype=torch.float64)[:, None, None] * age) * visible  # [H, T, S]
    sums = torch.einsum("hts,shd->thd", torch.einsum("thd,shd->hts", q, k) * weights, v).flatten(1)
    normed = sums / (sums.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * p[name + "norm.weight"]
    return (torch.sigmoid(x @ p[name + "gate.weight"].T) * normed) @ p[name + "out.weight"].T

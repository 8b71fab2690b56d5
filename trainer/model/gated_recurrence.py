"""The gated layer of a recurrence: MiniMax-01's attention layer around lightning attention.

Legend: T local tokens of one micro-batch, C width, H heads, D head dim.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from farspan.trainer.model.attention import AttentionInputs, RmsNorm
from farspan.trainer.model.config import ModelConfig


class GatedRecurrence(nn.Module):
    """out(sigmoid(gate(x)) * norm(o)), o of the recurrence of SiLU(query(x)), SiLU(key(x)), SiLU(value(x)).

    MiniMax-01, arXiv 2501.08313, section 2.2, and its published code. Only the decay encodes order: there is no RoPE.
    Sums of k v^T are not divided by sqrt(D) or by the number of terms: the norm, over all heads together, bounds them.
    Each head has its own keys and values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, inner = config.head_dim, config.heads * config.head_dim
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.gate = nn.Linear(config.width, inner, bias=False)
        self.norm = RmsNorm(inner, config.norm_epsilon)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        # [T, H * D] -> [T, H, D]
        q, k, v = (F.silu(layer(x)).unflatten(-1, (-1, self.head_dim)) for layer in (self.query, self.key, self.value))
        o = inputs.attention(q, k, v).flatten(1)  # [T, H, D] -> [T, H * D]
        return self.out(self.gate(x).sigmoid() * self.norm(o))  # [T, C]

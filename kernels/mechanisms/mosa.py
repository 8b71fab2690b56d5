"""MoSA, mixture of sparse attention (arXiv 2505.00315, section 3): every head chooses the tokens that it works on.

Expert choice, as in the published code: a head takes the `tokens / sparsity` tokens of a document with the highest
routing logits, at least two, and attends causally among them; its output is multiplied by the sigmoid of their logits.
Query heads that share a KV head share a choice. Later tokens take part in the choice, though their contents stay
hidden.

`causal_choice` is for autoregressive use, where later tokens cannot be known: a token is taken if it ranks among the
best `1 / sparsity` of the tokens of its document up to itself, or is the best of fewer tokens than that. With tokens in
random order, about as many are taken.

Defaults are those of the published code, which rotates half of each head only; here the model decides what is rotated,
by the tokens' positions in their documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.token_choice import Candidates, TokenChoice
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.routing.ranking import rank_among_earlier, rank_in_group


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MoSA(TokenChoice):
    """Expert choice of tokens by each KV head."""

    sparsity: int = 16
    """A head takes one in this many tokens of a document."""
    include_first: bool = False
    """Whether every head takes the first token of a document."""
    causal_choice: bool = False
    """Whether the choice of a token depends on earlier tokens only."""
    causal: bool = True
    """Whether a chosen token attends to earlier chosen tokens only."""

    def __post_init__(self) -> None:
        if self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be at least 1; 1 takes every token")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(sparsity=4, include_first=True),
            cls(sparsity=3, causal=False),
            cls(sparsity=4, include_first=True, causal_choice=True),
        )

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"mosa_16": cls(sparsity=16)}

    def among(self) -> Masked:
        return Dense(causal=self.causal)

    @property
    def counts_are_known(self) -> bool:
        # Of rising logits every token is the best so far, of falling ones the first alone is.
        return not self.causal_choice

    def scores(self, logits: Tensor, candidates: Candidates) -> Tensor:
        scores = logits[candidates.index]
        return scores.masked_fill((candidates.position == 0)[:, None], float("inf")) if self.include_first else scores

    def choose(self, logits: Tensor, candidates: Candidates) -> Tensor:
        # Everything below is in document order, [tokens] and [tokens, Hk]; the result goes back to the rows' order.
        index, first, position = candidates.index, candidates.first, candidates.position
        scores = self.scores(logits, candidates)
        if self.causal_choice:
            count = ((position + 1) // self.sparsity).clamp(min=1)
            chosen = rank_among_earlier(scores, first) < count[:, None]
        else:
            # Two tokens at least, as in the published code, but no more than there are.
            length = candidates.end - first + 1
            count = torch.minimum((length // self.sparsity).clamp(min=2), length)
            chosen = rank_in_group(scores, first) < count[:, None]
        chosen &= candidates.real[:, None]
        return torch.empty_like(chosen).index_copy_(0, index, chosen)


MECHANISMS.add("mosa", MoSA)

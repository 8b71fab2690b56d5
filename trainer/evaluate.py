"""Held-out loss: nats per token, bits per byte, and loss by how much context a token has."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from farspan.trainer.batch import MicroBatch
from farspan.trainer.data.packing import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """loss: mean nats per labelled token. by_position: the same for tokens by position in their document.

    Keys of `by_position` are "from-to" in tokens, both included; bins double in width; empty ones are left out.
    """

    loss: float
    by_position: dict[str, float]

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[MicroBatch], sequence_tokens: int) -> Evaluation:
    """Run `batches`, equally many on every rank, and return the same result on every rank."""
    edges = _bin_edges(sequence_tokens)
    totals: torch.Tensor | None = None
    for batch in batches:
        losses = model(batch.tokens, batch.labels, batch.context).double()
        if totals is None:
            totals = torch.zeros(2, len(edges), dtype=torch.float64, device=losses.device)
        # A token with position p has p + 1 tokens to predict the next one from.
        bins = torch.bucketize(batch.context.rows.position, edges.to(losses.device), right=True) - 1
        labelled = (batch.labels != IGNORED).double()
        totals[0].index_add_(0, bins, losses)
        totals[1].index_add_(0, bins, labelled)
    assert totals is not None, "no held-out sequence to evaluate on"
    dist.all_reduce(totals)
    loss_sums, counts = totals.tolist()
    firsts = edges.tolist()
    lasts = [*(first - 1 for first in firsts[1:]), sequence_tokens - 1]
    by_position = {
        f"{first}-{last}": loss_sum / count
        for first, last, loss_sum, count in zip(firsts, lasts, loss_sums, counts, strict=True)
        if count
    }
    return Evaluation(loss=sum(loss_sums) / sum(counts), by_position=by_position)


def _bin_edges(sequence_tokens: int) -> torch.Tensor:
    """First positions of the bins: 0, 64, 128, 256, ... below `sequence_tokens`, int32."""
    edges, edge = [0], 64
    while edge < sequence_tokens:
        edges.append(edge)
        edge *= 2
    return torch.tensor(edges, dtype=torch.int32)

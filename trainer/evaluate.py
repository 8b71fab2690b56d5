"""Held-out loss: nats per token, bits per byte, and loss by how much context a token has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from farspan.errors import DataError
from farspan.trainer.batch import MicroBatch
from farspan.trainer.data.packing import IGNORED, PackedSequence, PackedSequences
from farspan.trainer.resilience.agreement import any_rank

FIRST_BIN_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """loss: mean nats per labeled token, of which there are `tokens`. by_position: by position in their document.

    Keys of `by_position` are "from-to" in tokens, both included; bins double in width; empty ones are left out.
    """

    loss: float
    tokens: int
    by_position: dict[str, float]

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Return the loss per byte of text, of which a labeled token stands for `bytes_per_token`."""
        return self.loss / math.log(2) / bytes_per_token


def share(validation: PackedSequences, sequences: int, *, data_rank: int, groups: int) -> Iterator[PackedSequence]:
    """Yield one data-parallel group's part of the first `sequences`; every group gets equally many.

    What is missing for that is made up by sequences without labels.
    """
    wanted = min(sequences, len(validation))
    for index in range(data_rank, -(-wanted // groups) * groups, groups):
        sequence = validation.sequence(min(index, wanted - 1))
        if index >= wanted:
            sequence = replace(sequence, labels=np.full_like(sequence.labels, IGNORED))
        yield sequence


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterator[MicroBatch],
    *,
    sequence_tokens: int,
    poll: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run `batches`, equally many on every rank; return the same result on every rank.

    poll: called before each of them, says whether to stop; None if it said so on some rank. Raises DataError when no
    token has a label.
    """
    edges = _bin_edges(sequence_tokens)
    totals = torch.zeros(2, len(edges), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            if any_rank(poll()):
                return None
            losses = model(batch.tokens, batch.labels, batch.context).losses.double()
            # A token at position p has p + 1 tokens to predict the next one from.
            bins = torch.bucketize(batch.context.rows.position, edges.to(losses.device), right=True) - 1
            labeled = (batch.labels != IGNORED).double()
            sums = torch.zeros(totals.shape, dtype=torch.float64, device=losses.device)
            totals += sums.index_add_(1, bins, torch.stack((losses, labeled))).cpu()
    finally:
        model.train(training)
    dist.all_reduce(totals)
    loss_sums, counts = totals.tolist()
    if not sum(counts):
        raise DataError("no token of the held-out sequences has a label: raise evaluate.sequences, or prepare others.")
    firsts = edges.tolist()
    lasts = [*(first - 1 for first in firsts[1:]), sequence_tokens - 1]
    by_position = {
        f"{first}-{last}": loss_sum / count
        for first, last, loss_sum, count in zip(firsts, lasts, loss_sums, counts, strict=True)
        if count
    }
    return Evaluation(loss=sum(loss_sums) / sum(counts), tokens=int(sum(counts)), by_position=by_position)


def _bin_edges(sequence_tokens: int) -> torch.Tensor:
    """First positions of the bins: 0, 64, 128, 256, ... below `sequence_tokens`, int32."""
    edges, edge = [0], FIRST_BIN_TOKENS
    while edge < sequence_tokens:
        edges.append(edge)
        edge *= 2
    return torch.tensor(edges, dtype=torch.int32)

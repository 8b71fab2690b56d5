"""Held-out loss: nats per token, bits per byte, and loss by how much context a token has."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchBuilder, MicroBatch
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PackedSequence, PackedSequences
from farspan.trainer.data.source import TokenSource, unigram_bits_per_byte
from farspan.trainer.metrics import Metrics
from farspan.trainer.resilience.agreement import any_rank
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resilience.watchdog import Watchdog

FIRST_BIN_TOKENS = 64

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    loss: float
    """Mean nats per labeled token, NaN without any."""
    tokens: int
    """Labeled tokens."""
    by_position: dict[str, float]
    """The same by position in the document; keys are "first-last" in tokens; bins double in width; none is empty."""

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


def share(validation: PackedSequences, sequences: int, *, data_rank: int, groups: int) -> Iterator[PackedSequence]:
    """Yield one data-parallel group's part of the first `sequences`; every group gets equally many.

    Groups with fewer sequences get some without labels besides.
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
    is_stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run `batches`, equally many on every rank; return the same result on every rank.

    is_stopping: called before each batch; None if it is true on some rank.
    """
    # First positions of the bins: 0, 64, 128, 256, ...
    firsts = [0, *takewhile(lambda first: first < sequence_tokens, (FIRST_BIN_TOKENS << n for n in count()))]
    totals = torch.zeros(2, len(firsts), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            if any_rank(is_stopping()):
                return None
            losses = model(batch.tokens, batch.labels, batch.context).losses.double()
            # A token at position p has p + 1 tokens to predict the next one from.
            boundaries = torch.tensor(firsts, dtype=torch.int32, device=losses.device)
            bins = torch.bucketize(batch.context.rows.position, boundaries, right=True) - 1
            labeled = (batch.labels != IGNORED).double()
            sums = torch.zeros(totals.shape, dtype=torch.float64, device=losses.device)
            totals += sums.index_add_(1, bins, torch.stack((losses, labeled))).cpu()
    finally:
        model.train(training)
    dist.all_reduce(totals)
    loss_sums, counts = totals.tolist()
    tokens = int(sum(counts))
    if not tokens:
        log.warning("%-12sno token of the held-out sequences has a label: raise evaluate.sequences", "held out")
    lasts = [*(first - 1 for first in firsts[1:]), sequence_tokens - 1]
    by_position = {
        f"{first}-{last}": loss_sum / count
        for first, last, loss_sum, count in zip(firsts, lasts, loss_sums, counts, strict=True)
        if count
    }
    loss = sum(loss_sums) / tokens if tokens else math.nan
    return Evaluation(loss=loss, tokens=tokens, by_position=by_position)


class Validation:
    """The held-out data of a run and when to evaluate on it; all ranks make the same calls."""

    def __init__(
        self,
        config: Config,
        source: TokenSource,
        mesh: Mesh,
        batches: BatchBuilder,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self._steps, self._config = config.train.steps, config.evaluate
        self._mesh, self._batches, self._stop, self._watchdog = mesh, batches, stop, watchdog
        self._data = PackedSequences(
            source, sequence_tokens=config.data.sequence_tokens, seed=config.run.seed, shuffle=False, repeat=False
        )
        # The end token is predicted as well, but stands for no text, and the first token is not predicted.
        self._bytes_per_token = source.num_bytes / (source.num_tokens - source.num_documents)
        self._unigram_bits_per_byte = unigram_bits_per_byte(source)

    def is_due(self, step: int) -> bool:
        every = self._config.every_steps
        return step >= self._steps or (every > 0 and step > 0 and step % every == 0)

    def is_missing(self, step: int, metrics: Metrics) -> bool:
        """Return whether the evaluation of `step` is due and not on record: a stop prevented it."""
        return self.is_due(step) and not metrics.has_evaluation(step)

    def run(self, model: nn.Module, step: int, metrics: Metrics) -> bool:
        """Evaluate, record and log; return whether a stop signal prevented that."""

        def is_stopping() -> bool:
            # Each sequence has the phase's whole time.
            self._watchdog.restart()
            return self._stop.requested

        sequences = share(
            self._data, self._config.sequences, data_rank=self._mesh.data_rank, groups=self._mesh.degrees.data
        )
        batches, length = map(self._batches.build, sequences), self._data.sequence_tokens
        with self._watchdog.phase("evaluation", step):
            evaluation = evaluate(model, batches, sequence_tokens=length, is_stopping=is_stopping)
        if evaluation is None:
            return True
        bits_per_byte = evaluation.bits_per_byte(self._bytes_per_token)
        metrics.write(
            {
                "step": step,
                "eval_loss": evaluation.loss,
                "eval_tokens": evaluation.tokens,
                "bits_per_byte": bits_per_byte,
                "unigram_bits_per_byte": self._unigram_bits_per_byte,
                "loss_by_position": evaluation.by_position,
            }
        )
        log.info(
            "held out    %.3f bits per byte over %d sequences, %s tokens (unigram entropy %.3f)",
            bits_per_byte,
            min(self._config.sequences, len(self._data)),
            f"{evaluation.tokens:,}",
            self._unigram_bits_per_byte,
        )
        by_position = "  ".join(f"{where}: {loss:.3f}" for where, loss in evaluation.by_position.items())
        log.info("            loss by position  %s", by_position)
        return False

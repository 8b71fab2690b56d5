"""Loss on held-out data: nats per token, bits per byte, and loss by how much context a token has.

What counts is every token that is predicted, as in training: not padding and not the first token of a document, but its
end token, whose loss counts and which stands for no bytes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchBuilder, BatchThread, MicroBatch
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED
from farspan.trainer.data.token_bytes import count_bytes
from farspan.trainer.data.validation import OWN_SET, ValidationSet
from farspan.trainer.metrics import Metrics
from farspan.trainer.resilience.agreement import any_rank
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resilience.watchdog import Watchdog

FIRST_BIN_TOKENS = 64

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    loss: float
    """Mean nats per labeled token."""
    label_counts: np.ndarray
    """int64 `[vocabulary]`: how often each token was a label."""
    before_counts: np.ndarray
    """How often each token was followed by a label."""
    by_position: dict[str, float]
    """The loss by position in the document; keys are "first-last" in tokens; bins double in width; none is empty."""

    @property
    def tokens(self) -> int:
        return int(self.label_counts.sum())

    def record(self, token_bytes: np.ndarray | None) -> dict[str, Any]:
        """Return what metrics.jsonl has of it; bits per byte only with bytes.

        token_bytes: int32 `[vocabulary]`. Unigram bits are the entropy of the labels' own frequencies.
        """
        num_bytes = 0 if token_bytes is None else count_bytes(token_bytes, self.label_counts, self.before_counts)
        counts = self.label_counts[self.label_counts > 0]
        unigram_bits = float(counts @ np.log2(self.tokens / counts))
        per_byte = {
            "bits_per_byte": self.loss * self.tokens / math.log(2) / num_bytes,
            "unigram_bits_per_byte": unigram_bits / num_bytes,
        } if num_bytes else {}  # fmt: skip
        return {"loss": self.loss, "tokens": self.tokens, **per_byte, "loss_by_position": self.by_position}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterator[MicroBatch],
    *,
    sequence_tokens: int,
    vocabulary_size: int,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run `batches`, equally many on every rank; return the same result on every rank.

    is_stopping: called before each batch; None if it is true on some rank. At least one token has a label.
    """
    # First positions of the bins: 0, 64, 128, 256, ...
    firsts = [0, *takewhile(lambda first: first < sequence_tokens, (FIRST_BIN_TOKENS << n for n in count()))]
    totals = torch.zeros(2, len(firsts), dtype=torch.float64)
    # Of labels and of the tokens before them; the last is for tokens without a label.
    token_counts = torch.zeros(2, vocabulary_size + 1, dtype=torch.int64)
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
            labeled = batch.labels != IGNORED
            sums = torch.zeros(totals.shape, dtype=torch.float64, device=losses.device)
            totals += sums.index_add_(1, bins, torch.stack((losses, labeled.double()))).cpu()
            pairs = torch.stack((batch.labels, batch.tokens)).where(labeled, vocabulary_size)
            token_counts += torch.stack([torch.bincount(of, minlength=vocabulary_size + 1) for of in pairs.cpu()])
    finally:
        model.train(training)
    dist.all_reduce(totals)
    dist.all_reduce(token_counts)
    loss_sums, counts = totals.tolist()
    lasts = [*(first - 1 for first in firsts[1:]), sequence_tokens - 1]
    by_position = {
        f"{first}-{last}": loss_sum / count
        for first, last, loss_sum, count in zip(firsts, lasts, loss_sums, counts, strict=True)
        if count
    }
    label_counts, before_counts = token_counts[:, :-1].numpy()
    return Evaluation(
        loss=sum(loss_sums) / sum(counts),
        label_counts=label_counts,
        before_counts=before_counts,
        by_position=by_position,
    )


class Validation:
    """The validation sets of a run and when to evaluate on them; all ranks make the same calls."""

    def __init__(
        self,
        config: Config,
        sets: Mapping[str, ValidationSet],
        mesh: Mesh,
        batches: BatchBuilder,
        thread: BatchThread,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self._steps, self._every_steps, self._sets = config.train.steps, config.evaluate.every_steps, sets
        self._mesh, self._batches, self._thread = mesh, batches, thread
        self._stop, self._watchdog = stop, watchdog

    def is_due(self, step: int) -> bool:
        return step >= self._steps or (self._every_steps > 0 and step > 0 and step % self._every_steps == 0)

    def is_missing(self, step: int, metrics: Metrics) -> bool:
        """Return whether the evaluation of `step` is due and not on record: a stop prevented it."""
        return self.is_due(step) and not metrics.has_evaluation(step)

    def run(self, model: nn.Module, step: int, metrics: Metrics) -> bool:
        """Evaluate, record and log; return whether a stop signal prevented that."""
        record: dict[str, Any] = {"step": step}
        with self._watchdog.phase("evaluation", step):
            for name, validation_set in self._sets.items():
                evaluation = self._evaluate(model, name, validation_set)
                if evaluation is None:
                    return True
                found = evaluation.record(validation_set.token_bytes)
                log_evaluation(name, found)
                record |= named(name, found)
        metrics.write(record)
        return False

    def _evaluate(self, model: nn.Module, name: str, validation_set: ValidationSet) -> Evaluation | None:
        def is_stopping() -> bool:
            # Each sequence has the phase's whole time.
            self._watchdog.restart()
            return self._stop.requested

        def build(place: int) -> MicroBatch:
            return self._batches.build(validation_set.sequence(place))

        places = validation_set.share(data_rank=self._mesh.data_rank, groups=self._mesh.degrees.data)
        builds = ((f"sequence {place} of the held-out set {name!r}", partial(build, place)) for place in places)
        with closing(self._thread.in_turn(builds)) as batches:
            return evaluate(
                model,
                batches,
                sequence_tokens=validation_set.data.sequence_tokens,
                vocabulary_size=validation_set.source.vocabulary_size,
                is_stopping=is_stopping,
            )


def named(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation under the keys of metrics.jsonl: those of a set begin with its name.

    Of the training data's own only `eval_loss` and `eval_tokens` do, which the records of steps have as well.
    """
    own = {"loss", "tokens"} if name == OWN_SET else found.keys()
    return {f"{name}_{key}" if key in own else key: value for key, value in found.items()}


def log_evaluation(name: str, found: Mapping[str, Any]) -> None:
    bits = ""
    if "bits_per_byte" in found:
        bits = f"{found['bits_per_byte']:.3f} bits per byte (unigram entropy {found['unigram_bits_per_byte']:.3f}), "
    log.info("%-12s%s: %sloss %.4f over %s tokens", "held out", name, bits, found["loss"], f"{found['tokens']:,}")
    by_position = "  ".join(f"{where}: {loss:.3f}" for where, loss in found["loss_by_position"].items())
    log.info("            loss by position  %s", by_position)

"""Held-out data of a run: its share for each rank, and how what was measured on it is told."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchBuilder
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.data.source import TokenSource, unigram_bits_per_byte
from farspan.trainer.evaluate import Evaluation, evaluate, share

log = logging.getLogger("farspan")


class Validation:
    """The sequences that a run is evaluated on, and the bytes that their tokens stand for."""

    def __init__(self, source: TokenSource, config: Config) -> None:
        self._sequence_tokens, self._sequences = config.data.sequence_tokens, config.evaluate.sequences
        self._data = PackedSequences(
            source, sequence_tokens=self._sequence_tokens, seed=config.run.seed, shuffle=False, repeat=False
        )
        # The end token is predicted as well, but stands for no text, and the first token is not predicted.
        self._bytes_per_token = source.num_bytes / (source.num_tokens - source.num_documents)
        self._unigram_bits_per_byte = unigram_bits_per_byte(source)

    def measure(
        self, model: nn.Module, batches: BatchBuilder, mesh: Mesh, poll: Callable[[], bool]
    ) -> Evaluation | None:
        """Return what `evaluate` does of the run's sequences."""
        mine = share(self._data, self._sequences, data_rank=mesh.data_rank, groups=mesh.degrees.data)
        return evaluate(model, map(batches.build, mine), sequence_tokens=self._sequence_tokens, poll=poll)

    def record(self, measured: Evaluation, step: int) -> dict[str, Any]:
        """Return what is on record of an evaluation."""
        return {
            "step": step,
            "eval_loss": measured.loss,
            "eval_tokens": measured.tokens,
            "bits_per_byte": measured.bits_per_byte(self._bytes_per_token),
            "unigram_bits_per_byte": self._unigram_bits_per_byte,
            "loss_by_position": measured.by_position,
        }

    def say(self, measured: Evaluation) -> None:
        log.info(
            "held out    %.3f bits per byte over %d sequences, %s tokens (unigram entropy %.3f)",
            measured.bits_per_byte(self._bytes_per_token),
            min(self._sequences, len(self._data)),
            f"{measured.tokens:,}",
            self._unigram_bits_per_byte,
        )
        shown = "  ".join(f"{where}: {loss:.3f}" for where, loss in measured.by_position.items())
        log.info("            loss by position  %s", shown)

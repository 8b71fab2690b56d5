"""Texts tokenized by several processes; results come in the order of the texts, whatever the number of processes."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Self

import numpy as np

from farspan.errors import DataError
from farspan.trainer.data.pieces import PIECE_BYTES, Piece
from farspan.trainer.data.tokenizer import Tokenizer
from farspan.trainer.resilience.signals import stop_signals_blocked

Results = list[np.ndarray | str]
"""The ids of each text, uint32 [tokens], or why it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece of a document to tokenize, and where it belongs."""

    piece: Piece
    origin: str
    """Of the document."""
    split: int
    """An index into SPLITS."""
    point: float
    """The document's, see `prepare.split_point`."""
    document_bytes: int | None
    """The size of the document in this split at its last piece, else None."""


def tokenize(
    parts: Iterable[Part], tokenizer: Tokenizer, workers: int
) -> Generator[tuple[Part, np.ndarray], None, None]:
    """Yield each part with its ids, uint32 [tokens], in order; raises DataError naming a document or a dead worker.

    workers: processes to start; 1 tokenizes in this one.
    """
    if workers == 1:
        for batch in _batches(parts):
            yield from _checked(batch, _encode(tokenizer, [part.piece.text for part in batch]))
        return
    with ExitStack() as stack:
        busy: deque[tuple[_Worker, list[Part]]] = deque()
        for batch in _batches(parts):
            done: Iterator[tuple[Part, np.ndarray]] = iter(())
            if len(busy) < workers:
                worker = stack.enter_context(_Worker(tokenizer, f"{len(busy) + 1} of {workers}"))
            else:
                worker, before = busy.popleft()
                done = _checked(before, worker.receive(before[0].origin))
            # One batch at a time: were a second one sent, both ends could wait for the other to read.
            worker.send(batch)
            busy.append((worker, batch))
            yield from done
        for worker, batch in busy:
            yield from _checked(batch, worker.receive(batch[0].origin))


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts so that a batch takes much longer than to send it."""
    batch, num_bytes = [], 0
    for part in parts:
        batch.append(part)
        num_bytes += len(part.piece.text)
        if num_bytes >= PIECE_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Results:
    results: Results = []
    for text in texts:
        try:
            results.append(tokenizer.encode(text.decode()))
        except DataError as error:
            results.append(str(error))
    return results


def _checked(batch: Sequence[Part], results: Results) -> Iterator[tuple[Part, np.ndarray]]:
    for part, ids in zip(batch, results, strict=True):
        if isinstance(ids, str):
            raise DataError(f"{part.origin}: {ids}")
        yield part, ids[part.piece.context_tokens :]


class _Worker:
    """A process that tokenizes what it is sent; it ends when this process does."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        # Not forked: the tokenizers package starts threads, which a forked process lacks but waits for.
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, tokenizer), daemon=True)
        # Its start unblocks signals, so it has to be before the block.
        resource_tracker.ensure_running()
        # Ctrl-C reaches all processes of a terminal; this one ends its workers, which inherit the block.
        with stop_signals_blocked():
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def send(self, batch: Sequence[Part]) -> None:
        try:
            self._connection.send([part.piece.text for part in batch])
        except OSError:
            raise self._death(batch[0].origin) from None

    def receive(self, origin: str) -> Results:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._death(origin) from None

    def _death(self, origin: str) -> DataError:
        self._process.join()
        status = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        reason = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return DataError(
            f"Worker {self._name} (process {self._process.pid}) {how}{reason}, at {origin}: start again, with fewer "
            "--workers if memory is short."
        )


def _work(connection: Connection, tokenizer: Tokenizer) -> None:
    # The other end is closed when its process has ended.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(_encode(tokenizer, connection.recv()))

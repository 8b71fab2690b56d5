"""Documents packed into sequences of one length: a stream addressed by a global cursor, the same for every world size.

    epoch e    | doc 4 ......... | doc 0 .. | doc 2 ........... |        epoch e + 1  | doc 2 ...
    sequences  [     i     ][    i + 1     ][    i + 2     ][    i + 3     ] ...
    document    0 0 0 0 0 0  0 0 0 1 1 1 2 2  0 0 0 ...          0 0 1 1 1

An epoch is all documents in an order drawn from (seed, epoch);
sequence i is tokens [i * L, (i + 1) * L) of all epochs in a row.

Example: documents a b . | c . | d e f . in this order, where "." is the end token, packed into sequences of 4 tokens.

    tokens      a  b  .  c      .  d  e  f      .
    labels      b  .  -  .      -  e  f  .      -        "-" is IGNORED; f knows its label past the border
    position    0  1  2  0      0  0  1  2      0        a fragment starts again at 0
    document    0  0  0  1      0  1  1  1      0        counts fragments of this sequence
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from farspan.errors import ConfigError
from farspan.trainer.data.source import TokenSource

IGNORED = -100
PADDING = -1
HASH_BYTES = 4
"""float64 sums two million numbers of this many bytes exactly, in any order."""
FEISTEL_ROUNDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSequence:
    """One training sequence; a document cut at its border goes on in the next sequence as a new fragment."""

    tokens: np.ndarray
    """int64 [tokens]."""
    labels: np.ndarray
    """int64 [tokens]: the next token of the same document, known even past the border; IGNORED at its end token."""
    position: np.ndarray
    """int32 [tokens]: position inside the fragment, from 0."""
    document: np.ndarray
    """int32 [tokens]: 0, 1, 2 ... inside this sequence, PADDING in the tail of a source that does not repeat."""


class PackedSequences:
    """Sequences of `sequence_tokens` by index; the only state is a cache of the current epoch's order."""

    def __init__(
        self, source: TokenSource, *, sequence_tokens: int, seed: int, shuffle: bool = True, repeat: bool = True
    ) -> None:
        """Raises ConfigError for a length below 1 or a negative seed."""
        if sequence_tokens < 1:
            raise ConfigError(f"sequence_tokens={sequence_tokens} is too small; give at least 1.")
        if seed < 0:
            raise ConfigError(f"seed={seed} is negative; give 0 or more.")
        self._source, self.sequence_tokens = source, sequence_tokens
        self._seed, self._shuffle, self._repeat = seed, shuffle, repeat
        self._epoch = lru_cache(maxsize=1)(self._compute_epoch)

    def __len__(self) -> int:
        """Number of sequences, the padded last one included; raises TypeError for a repeating source."""
        if self._repeat:
            raise TypeError("a repeating source has no length")
        return -(-self._source.num_tokens // self.sequence_tokens)

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` of the stream; raises IndexError below 0 or past the end."""
        if index < 0 or (not self._repeat and index >= len(self)):
            raise IndexError(f"sequence {index} is outside of the stream")
        length = self.sequence_tokens
        tokens = np.full(length, self._source.end_id, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        position = np.zeros(length, dtype=np.int32)
        document = np.full(length, PADDING, dtype=np.int32)
        filled = num_fragments = 0
        # One span for each epoch that the sequence touches.
        while filled < length:
            epoch, start = divmod(index * length + filled, self._source.num_tokens)
            if epoch > 0 and not self._repeat:
                break
            span = self._span(epoch, start, min(start + length - filled, self._source.num_tokens))
            rows = slice(filled, filled + len(span.tokens))
            tokens[rows], labels[rows], position[rows] = span.tokens, span.labels, span.position
            document[rows] = span.document + num_fragments
            num_fragments += int(span.document[-1]) + 1
            filled = rows.stop
        return PackedSequence(tokens=tokens, labels=labels, position=position, document=document)

    def _span(self, epoch: int, start: int, stop: int) -> PackedSequence:
        """Gather stream tokens [start, stop) of one epoch; fragments count from 0."""
        order, all_borders = self._epoch(epoch)
        first = int(np.searchsorted(all_borders, start, side="right")) - 1
        last = int(np.searchsorted(all_borders, stop, side="left"))
        # Documents [first, last) of the epoch overlap the span; the outer two may be cut.
        borders = all_borders[first : last + 1]
        starts = np.maximum(borders[:-1], start)  # [fragments], in the stream
        lengths = np.minimum(borders[1:], stop) - starts
        documents = order[first:last]
        # Index in the file minus index in the stream: constant within a fragment.
        shifts = self._source.offsets[documents] - borders[:-1]
        ends = self._source.offsets[documents + 1] - 1  # file index of each fragment's end token

        stream = np.arange(start, stop, dtype=np.int64)  # [tokens]
        in_file = stream + np.repeat(shifts, lengths)
        at_end = in_file == np.repeat(ends, lengths)
        following = np.where(at_end, in_file, in_file + 1)  # the last token of the file has no next one to read
        return PackedSequence(
            tokens=self._source.tokens[in_file],
            labels=np.where(at_end, IGNORED, self._source.tokens[following].astype(np.int64)),
            position=stream - np.repeat(starts, lengths),
            document=np.repeat(np.arange(last - first), lengths),
        )

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return documents in stream order, int64 [documents], and where each starts in the stream of this epoch.

        The latter is int64 [documents + 1], with the end of the last.
        """
        num_documents = self._source.num_documents
        if self._shuffle:
            # numpy keeps raw bit streams the same across versions, unlike Generator.permutation: a run resumed with a
            # newer numpy must see the same documents.
            bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
            order = np.argsort(np.asarray(bits.random_raw(num_documents)), kind="stable")
        else:
            order = np.arange(num_documents, dtype=np.int64)
        borders = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(np.diff(self._source.offsets)[order], out=borders[1:])
        return order, borders


class ShuffledSequences(PackedSequences):
    """The endless stream, with a different order of sequences in each epoch.

    Packing puts documents end to end, so that a long document fills many sequences in a row: read in that order, batch
    after batch would come from it. The order follows from the index: no state to store or resume. A sequence that
    straddles two epochs belongs to the one in which it starts.
    """

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` of the shuffled stream; raises IndexError below 0."""
        if index < 0:
            raise IndexError(f"sequence {index} is outside of the stream")
        length, epoch_tokens = self.sequence_tokens, self._source.num_tokens
        epoch = index * length // epoch_tokens
        # Sequences [first, first + count) start in this epoch: ceil of where the epoch starts, in sequences.
        first = -(-epoch * epoch_tokens // length)
        count = -(-(epoch + 1) * epoch_tokens // length) - first
        return super().sequence(first + shuffled_place(index - first, count, f"{self._seed}/{epoch}"))


def shuffled_place(index: int, count: int, key: str) -> int:
    """Return where `index` of `count` goes in the permutation named `key`.

    A Feistel network permutes the next power of four; results of `count` or more go through it again until they fall
    below (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2).
    """
    assert 0 <= index < count, (index, count)
    # Two halves of equal width, so that a round can swap them; [0, 4 ** half_bits) is the domain.
    half_bits = max(((count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(FEISTEL_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            # A bijection whatever the digest: XOR with it again inverts the round.
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half_bits | right
        if index < count:
            return index


def sequence_hash(index: int, sequence: PackedSequence) -> int:
    """Return a hash of `sequence` at `index` of the stream: its tokens, labels and documents."""
    digest = hashlib.sha256(str(index).encode())
    for part in (sequence.tokens, sequence.labels, sequence.document):
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest()[:HASH_BYTES])


def sequence_seed(seed: int, index: int) -> int:
    """Return the seed of the random numbers for sequence `index` in a run of `seed`, on whatever rank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7])

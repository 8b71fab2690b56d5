"""What a run learns from, in numbers that are the same however its sequences are dealt to ranks."""

import hashlib

from farspan.trainer.data.packing import PackedSequence

FINGERPRINT_BYTES = 4
"""float64 adds up two million numbers of so many bytes exactly, in any order."""


def fingerprint(index: int, sequence: PackedSequence) -> int:
    """Return a number that stands for `sequence` at place `index` of the stream: its tokens, labels and documents."""
    digest = hashlib.sha256(str(index).encode())
    for part in (sequence.tokens, sequence.labels, sequence.document):
        digest.update(part.tobytes())
    return int.from_bytes(digest.digest()[:FINGERPRINT_BYTES])


def follow(stream: str, total: int) -> str:
    """Return the hash of a stream after a step whose sequences' fingerprints add up to `total`."""
    return hashlib.sha256(f"{stream}/{total}".encode()).hexdigest()[:16]


def sequence_seed(seed: int, index: int) -> int:
    """Return the seed of what is drawn for sequence `index` in a run of `seed`, on whatever rank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7])

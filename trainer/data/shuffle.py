"""Sequences in random order within each epoch, computed from their index: no state to store or resume.

Packing puts documents end to end, so that a long document fills many sequences in a row. Read in that order, a training
batch, and the batches after it, would come from a single document.
"""

import hashlib

from farspan.trainer.data.packing import PackedSequence, PackedSequences

FEISTEL_ROUNDS = 4


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


class ShuffledSequences:
    """The endless stream of a repeating `PackedSequences`, with a different order of sequences in each epoch.

    A sequence that straddles two epochs belongs to the one in which it starts.
    """

    def __init__(self, packed: PackedSequences, *, seed: int) -> None:
        self._packed = packed
        self._seed = seed

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` of the shuffled stream; raises IndexError below 0."""
        if index < 0:
            raise IndexError(f"sequence {index} is outside of the stream")
        length, epoch_tokens = self._packed.sequence_tokens, self._packed.epoch_tokens
        epoch = index * length // epoch_tokens
        # Sequences [first, first + count) start in this epoch: ceil of where the epoch starts, in sequences.
        first = -(-epoch * epoch_tokens // length)
        count = -(-(epoch + 1) * epoch_tokens // length) - first
        return self._packed.sequence(first + shuffled_place(index - first, count, f"{self._seed}/{epoch}"))

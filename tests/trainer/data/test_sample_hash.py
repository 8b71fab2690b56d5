from dataclasses import replace

import numpy as np

from farspan.trainer.data.packing import PackedSequence
from farspan.trainer.data.sample_hash import fingerprint, follow, sequence_seed

SEQUENCE = PackedSequence(
    tokens=np.array([1, 2, 3]),
    labels=np.array([2, 3, -100]),
    position=np.array([0, 1, 2], dtype=np.int32),
    document=np.array([0, 0, 0], dtype=np.int32),
)


def test_a_fingerprint_tells_everything_apart_that_is_learnt_from() -> None:
    others = [
        fingerprint(5, replace(SEQUENCE, tokens=np.array([1, 2, 4]))),
        fingerprint(5, replace(SEQUENCE, labels=np.array([2, -100, -100]))),
        fingerprint(5, replace(SEQUENCE, document=np.array([0, 0, 1], dtype=np.int32))),
        fingerprint(6, SEQUENCE),
    ]
    assert len({fingerprint(5, SEQUENCE), *others}) == 5
    assert fingerprint(5, replace(SEQUENCE)) == fingerprint(5, SEQUENCE)
    assert all(0 <= number < 2**32 for number in others)


def test_a_stream_tells_the_order_of_steps() -> None:
    assert follow(follow("", 1), 2) != follow(follow("", 2), 1)
    assert len({follow("", 1), follow("", 2), follow("a", 1)}) == 3


def test_seeds_are_of_a_run_and_a_sequence() -> None:
    assert len({sequence_seed(1, 5), sequence_seed(5, 1), sequence_seed(1, 6), sequence_seed(2, 5)}) == 4

"""Packing against a stream rebuilt token by token in plain Python; hashes and seeds of sequences."""

from dataclasses import replace

import numpy as np
import pytest

from farspan.errors import ConfigError
from farspan.trainer.data.packing import (
    IGNORED,
    PADDING,
    PackedSequence,
    PackedSequences,
    sequence_hash,
    sequence_seed,
)

END = 256
LENGTHS = (5, 1, 0, 9, 2, 3, 17, 1)
FIELDS = ("tokens", "labels", "position", "document")


@pytest.fixture
def source(make_source):
    return make_source(LENGTHS)


def epoch_documents(source, seed, epoch, shuffle=True):
    """Return one epoch's documents in stream order, read with sequences of one token each."""
    packed = PackedSequences(source, sequence_tokens=1, seed=seed, shuffle=shuffle)
    documents, current = [], []
    for index in range(epoch * source.num_tokens, (epoch + 1) * source.num_tokens):
        current.append(int(packed.sequence(index).tokens[0]))
        if current[-1] == END:
            documents.append(current)
            current = []
    assert current == []
    return documents


def expected(documents, start, stop):
    """Walk over a list of documents and return tokens, labels, position, document of stream tokens [start, stop)."""
    rows, index, fragment = [], 0, -1
    for document in documents:
        position = 0
        for i, token in enumerate(document):
            if start <= index < stop:
                if position == 0:
                    fragment += 1
                rows.append((token, document[i + 1] if i + 1 < len(document) else IGNORED, position, fragment))
                position += 1
            index += 1
    return tuple(list(column) for column in zip(*rows, strict=True))


def as_lists(sequence):
    return tuple(getattr(sequence, name).tolist() for name in FIELDS)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 23, 46, 100])  # an epoch is 46 tokens: also several epochs a sequence
def test_sequences_are_the_stream_cut_up(source, length, shuffle):
    num_sequences = source.num_tokens // length + 3  # into the second epoch, or several epochs
    num_epochs = -(-num_sequences * length // source.num_tokens)
    documents = [d for epoch in range(num_epochs) for d in epoch_documents(source, 3, epoch, shuffle)]
    packed = PackedSequences(source, sequence_tokens=length, seed=3, shuffle=shuffle)
    for index in range(num_sequences):
        assert as_lists(packed.sequence(index)) == expected(documents, index * length, (index + 1) * length)


def test_an_epoch_holds_every_document_once(source):
    documents = sorted(source.document(i).tolist() for i in range(source.num_documents))
    for epoch in range(3):
        assert sorted(epoch_documents(source, 3, epoch)) == documents


def test_order_depends_on_seed_and_epoch_only(source):
    unshuffled = [source.document(i).tolist() for i in range(source.num_documents)]
    orders = [epoch_documents(source, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert order not in orders[:i]
        assert order != unshuffled
    assert epoch_documents(source, 1, 1) == orders[3]
    assert epoch_documents(source, 5, 2, shuffle=False) == unshuffled


def test_order_is_pinned_for_resumes_under_other_versions(source):
    assert [document[0] for document in epoch_documents(source, 0, 0)] == [20, 6, 5, 15, 17, END, 37, 0]


def test_types(source):
    sequence = PackedSequences(source, sequence_tokens=7, seed=0).sequence(0)
    assert [getattr(sequence, name).dtype.name for name in FIELDS] == ["int64", "int64", "int32", "int32"]
    assert all(getattr(sequence, name).shape == (7,) for name in FIELDS)
    assert (IGNORED, PADDING) == (-100, -1)


def test_resume_ranks_and_random_access(source):
    """A sequence depends on its index only, not on the sequences that an instance, or a rank, read before."""
    packed = PackedSequences(source, sequence_tokens=11, seed=7)
    run = [as_lists(packed.sequence(index)) for index in range(30)]
    for index in (29, 0, 13, 13, 4, 28):
        assert as_lists(packed.sequence(index)) == run[index]
        assert as_lists(PackedSequences(source, sequence_tokens=11, seed=7).sequence(index)) == run[index]


def test_without_repeat_the_tail_is_padded(source):
    packed = PackedSequences(source, sequence_tokens=7, seed=3, repeat=False)
    assert len(packed) == 7  # 46 tokens: six full sequences and four tokens
    documents = epoch_documents(source, 3, 0)
    for index in range(6):
        assert as_lists(packed.sequence(index)) == expected(documents, index * 7, index * 7 + 7)
    tokens, labels, position, document = expected(documents, 42, 46)
    padded = (tokens + [END] * 3, labels + [IGNORED] * 3, position + [0] * 3, document + [PADDING] * 3)
    assert as_lists(packed.sequence(6)) == padded
    for index in (-1, 7):
        with pytest.raises(IndexError, match=f"sequence {index} is outside"):
            packed.sequence(index)


@pytest.mark.parametrize(("length", "num_sequences"), [(45, 2), (46, 1), (47, 1), (500, 1)])
def test_without_repeat_the_length_rounds_up(source, length, num_sequences):
    packed = PackedSequences(source, sequence_tokens=length, seed=0, repeat=False)
    assert len(packed) == num_sequences
    real = [packed.sequence(i).document != PADDING for i in range(num_sequences)]
    assert sum(int(mask.sum()) for mask in real) == 46


def test_a_repeating_stream_has_no_length(source):
    packed = PackedSequences(source, sequence_tokens=7, seed=0)
    with pytest.raises(TypeError, match="repeating"):
        len(packed)
    with pytest.raises(IndexError, match="sequence -1"):
        packed.sequence(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sequence_tokens": 0, "seed": 0}, "sequence_tokens=0"), ({"sequence_tokens": 4, "seed": -1}, "seed=-1")],
)
def test_impossible_options_are_refused(source, options, message):
    with pytest.raises(ConfigError, match=message):
        PackedSequences(source, **options)


def test_a_far_index_costs_one_epoch(source):
    packed = PackedSequences(source, sequence_tokens=7, seed=3)
    far = 10**12
    sequence = packed.sequence(far)
    epoch, start = divmod(far * 7, source.num_tokens)
    documents = epoch_documents(source, 3, epoch) + epoch_documents(source, 3, epoch + 1)
    assert as_lists(sequence) == expected(documents, start, start + 7)


SEQUENCE = PackedSequence(
    tokens=np.array([1, 2, 3]),
    labels=np.array([2, 3, -100]),
    position=np.array([0, 1, 2], dtype=np.int32),
    document=np.array([0, 0, 0], dtype=np.int32),
)


def test_a_hash_depends_on_everything_that_a_step_learns_from() -> None:
    others = [
        sequence_hash(5, replace(SEQUENCE, tokens=np.array([1, 2, 4]))),
        sequence_hash(5, replace(SEQUENCE, labels=np.array([2, -100, -100]))),
        sequence_hash(5, replace(SEQUENCE, document=np.array([0, 0, 1], dtype=np.int32))),
        sequence_hash(6, SEQUENCE),
    ]
    assert len({sequence_hash(5, SEQUENCE), *others}) == 5
    assert sequence_hash(5, replace(SEQUENCE)) == sequence_hash(5, SEQUENCE)
    assert all(0 <= number < 2**32 for number in others)


def test_seeds_differ_between_runs_and_sequences() -> None:
    assert len({sequence_seed(1, 5), sequence_seed(5, 1), sequence_seed(1, 6), sequence_seed(2, 5)}) == 4

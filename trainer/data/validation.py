"""The validation sets of a run: the held-out split of its training data, and further folders by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from farspan.errors import DataError
from farspan.trainer.data.packing import IGNORED, PackedSequence, PackedSequences, shuffled_place
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.data.token_bytes import TOKEN_BYTES_FILE, read_token_bytes
from farspan.trainer.data.tokenizer import TOKENIZER_FILE
from farspan.trainer.data.tokenizer_files import files_beside_split, has_ids_of

OWN_SET = "eval"
"""The name of the set that the training data have."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValidationSet:
    """A fixed random sample of the sequences of a split, the same on every rank and after a resume."""

    source: TokenSource
    data: PackedSequences
    indexes: Sequence[int]
    """Of the sampled sequences, rising."""
    token_bytes: np.ndarray | None
    """int32 [vocabulary], None if unknown."""

    @classmethod
    def sample(cls, source: TokenSource, *, sequence_tokens: int, sequences: int, seed: int) -> Self:
        """Draw up to `sequences` without replacement; raises DataError where no token of these has a label."""
        data = PackedSequences(source, sequence_tokens=sequence_tokens, seed=seed, shuffle=False, repeat=False)
        places = (shuffled_place(index, len(data), f"evaluate/{seed}") for index in range(min(sequences, len(data))))
        indexes = sorted(places)
        if not any((data.sequence(index).labels != IGNORED).any() for index in indexes):
            raise DataError(
                f"no token has a label in the {len(indexes)} of {len(data)} sequences that evaluate.seed={seed} draws "
                f"from {source.folder}, whose documents have one token: raise evaluate.sequences, or prepare others."
            )
        return cls(source=source, data=data, indexes=indexes, token_bytes=read_token_bytes(source))

    def share(self, *, data_rank: int, groups: int) -> range:
        """Return the places in the sample of one data-parallel group's part; every group gets equally many.

        Groups with fewer sequences get places beyond the last besides.
        """
        return range(data_rank, -(-len(self.indexes) // groups) * groups, groups)

    def sequence(self, place: int) -> PackedSequence:
        """Return the sequence at a place in the sample; beyond the last, that one without labels."""
        sequence = self.data.sequence(self.indexes[min(place, len(self.indexes) - 1)])
        if place < len(self.indexes):
            return sequence
        return replace(sequence, labels=np.full_like(sequence.labels, IGNORED))

    def describe(self) -> str:
        """Return what is evaluated."""
        sample = f"{len(self.indexes):,} of {len(self.data):,} sequences of {self.source.folder}"
        if self.token_bytes is not None:
            return sample
        table = self.source.folder.parent / TOKEN_BYTES_FILE
        return f"{sample}; no bits per byte without {table}: prepare the data again with `farspan data prepare`"


def open_validation_sets(
    folders: Mapping[str, Path],
    *,
    train: TokenSource,
    own: TokenSource,
    sequence_tokens: int,
    sequences: int,
    seed: int,
) -> dict[str, ValidationSet]:
    """Return the sets by name, OWN_SET first, which is `own`; see `ValidationSet.sample` for the last three.

    Raises DataError for a folder that is not there, cannot be read or has other tokens than `train`.
    """
    sources = {OWN_SET: own}
    for name, folder in folders.items():
        where = f"evaluate.sets.{name}={str(folder)!r}"
        split = folder if (folder / META_FILE).is_file() else folder / SPLITS[1]
        if not (split / META_FILE).is_file():
            state = f"has no {SPLITS[1]}/{META_FILE}" if folder.exists() else "does not exist"
            raise DataError(f"{where} {state}: make it with `farspan data prepare`, or name another.")
        sources[name] = TokenSource(split)
        _check_same_tokenizer(sources[name], train, where)
    return {
        name: ValidationSet.sample(source, sequence_tokens=sequence_tokens, sequences=sequences, seed=seed)
        for name, source in sources.items()
    }


def describe_sets(sets: Mapping[str, ValidationSet]) -> list[str]:
    """Return a line for each set, for the header of a run."""
    return [f"{'held out':<12}{name}: {validation_set.describe()}" for name, validation_set in sets.items()]


def _check_same_tokenizer(source: TokenSource, train: TokenSource, where: str) -> None:
    if (source.vocabulary_size, source.end_id) == (train.vocabulary_size, train.end_id):
        tokenizer = files_beside_split(train).get(TOKENIZER_FILE)
        # Older data do not say what they were prepared with.
        if tokenizer is None or has_ids_of(source, tokenizer):
            return
    used, wanted = (
        f"{of.meta.tokenizer!r} ({of.vocabulary_size:,} tokens, end token {of.end_id})" for of in (source, train)
    )
    raise DataError(
        f"{where} was made with the tokenizer {used}, the training data with {wanted}: prepare both with the same one."
    )

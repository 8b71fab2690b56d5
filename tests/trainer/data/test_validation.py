"""Which sequences are evaluated, and which folders a run refuses to evaluate."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from farspan.errors import ConfigError, DataError
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import SplitWriter, TokenSource
from farspan.trainer.data.token_bytes import TOKEN_BYTES_FILE
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.data.validation import ValidationSet
from farspan.trainer.resolve import dry_run_plan, resolve
from farspan.trainer.validate import validate
from tests.support import tiny


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    """200 sequences of 10 tokens in one document, each of one byte."""
    with SplitWriter(tmp_path / "data" / "validation", tokenizer=load_tokenizer("bytes")) as writer:
        writer.add(np.repeat(np.arange(200), 10)[:-1], num_bytes=1999)
        writer.finish()
    return TokenSource(tmp_path / "data" / "validation")


def sample(source: TokenSource, sequences: int, seed: int = 0) -> ValidationSet:
    return ValidationSet.sample(source, sequence_tokens=10, sequences=sequences, seed=seed)


def test_the_sample_is_random_fixed_and_of_the_whole_split(source: TokenSource) -> None:
    drawn = sample(source, 8).indexes
    assert drawn == sample(source, 8).indexes == sorted(set(drawn))
    assert len(drawn) == 8
    # The first eighth has one of them on average; half of them are in each half, give or take.
    assert 2 <= sum(index < 100 for index in drawn) <= 6
    assert drawn != sample(source, 8, seed=1).indexes
    # More sequences are these and others, so that runs with different numbers share some.
    assert set(drawn) < set(sample(source, 20).indexes)
    assert sample(source, 8).describe() == f"8 of 200 sequences of {source.folder}"


@pytest.mark.parametrize("sequences", [200, 1000])
def test_all_are_taken_where_there_are_no_more(source: TokenSource, sequences: int) -> None:
    assert sample(source, sequences).indexes == list(range(200))


def test_the_sample_is_pinned(source: TokenSource) -> None:
    """Curves of runs on different versions are compared: never change this."""
    assert sample(source, 4).indexes == [22, 38, 59, 163]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_share_it(source: TokenSource, groups: int) -> None:
    drawn = sample(source, 7)
    shares = [[*map(drawn.sequence, drawn.share(data_rank=rank, groups=groups))] for rank in range(groups)]
    assert {len(share) for share in shares} == {-(-7 // groups)}
    labeled = [int(s.tokens[0]) for share in shares for s in share if (s.labels != IGNORED).any()]
    assert sorted(labeled) == list(drawn.indexes)


def test_a_sample_without_labels_is_refused(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "data" / "validation", tokenizer=load_tokenizer("bytes")) as writer:
        for length in [0] * 300 + [1]:
            writer.add(np.zeros(length), num_bytes=max(length, 1))
        writer.finish()
    with pytest.raises(DataError, match=r"no token has a label in the 2 of 31 sequences that evaluate\.seed=0 draws"):
        sample(TokenSource(tmp_path / "data" / "validation"), 2)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    return tiny.config(tiny_data, tmp_path / "run", ParallelConfig(context=2))


def with_sets(config: Config, **sets: Path) -> Config:
    return replace(config, evaluate=replace(config.evaluate, sets=sets))


def prepared(folder: Path, tokenizer: str = "bytes", **options: str) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text("one two three " * 40)
    prepare(
        [folder / "text.txt"],
        tokenizer=load_tokenizer(tokenizer, **options),
        out=folder / "out",
        validation_from_ends=True,
    )
    return folder / "out"


def test_a_set_is_the_held_out_split_of_a_folder_or_a_split(config: Config, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "more")
    found = resolve(with_sets(config, more=folder, all=folder / "train"), Ranks(world_size=2)).validation_sets
    assert {name: of.source.folder for name, of in found.items()} == {
        "eval": config.data.folder / "validation",
        "more": folder / "validation",
        "all": folder / "train",
    }
    assert found["more"].data.sequence_tokens == config.data.sequence_tokens


def test_folders_that_cannot_be_evaluated(config: Config, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    paths = {"gone": tmp_path / "gone", "empty": tmp_path / "empty", "tokens": tmp_path / "words" / "out"}
    paths["empty"].mkdir()
    words = {"</s>": 0, "[STOP]": 1, "<unk>": 256, "one": 2, "two": 3, "three": 4}
    path = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(path))
    prepared(tmp_path / "words", str(path))
    parts = {
        "gone": f"evaluate.sets.gone='{paths['gone']}' does not exist",
        "empty": f"evaluate.sets.empty='{paths['empty']}' has no validation/meta.json",
        "tokens": f"'{path}' (257 tokens, end token 0), the training data with 'bytes' (257 tokens, end token 256)",
    }
    for name, part in parts.items():
        refused = with_sets(config, **{name: paths[name]})
        with pytest.raises(DataError, match=re.escape(part)):
            resolve(refused, Ranks(world_size=2))
        with pytest.raises(DataError, match=re.escape(part)):
            dry_run_plan(refused, 2)
    assert not config.run.folder.exists()


def test_tokenizers_of_equal_size_are_told_apart(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folders = []
    for number, words in enumerate(("one two three", "four two three")):
        vocabulary = {word: index for index, word in enumerate(["</s>", "<unk>", *words.split()])}
        path = tmp_path / f"{number}.json"
        tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))
        folders.append(prepared(tmp_path / str(number), str(path)))
    config = tiny.config(folders[0], tmp_path / "run", ParallelConfig())
    config = replace(config, data=replace(config.data, sequence_tokens=2))
    with pytest.raises(DataError, match="prepare both with the same one"):
        resolve(with_sets(config, other=folders[1]), Ranks())
    # The same tokenizer; without a table there are no bits per byte, and this is said.
    same = prepared(tmp_path / "2", str(tmp_path / "0.json"))
    (same / TOKEN_BYTES_FILE).unlink()
    found = resolve(with_sets(config, other=same), Ranks()).validation_sets["other"]
    assert found.token_bytes is None
    assert f"no bits per byte without {same / TOKEN_BYTES_FILE}" in found.describe()
    assert "farspan data prepare" in found.describe()


@pytest.mark.parametrize("name", ["a/b", "", "eval", "a b", "code_unigram", "unigram", "é"])
def test_names_that_metrics_cannot_have(config: Config, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.sets\.{name} cannot name metrics"):
        validate(with_sets(config, **{name: Path("data")}), Degrees.resolve(config.parallel, 2))
    validate(with_sets(config, **{"books.v2-long_1": Path("data")}), Degrees.resolve(config.parallel, 2))

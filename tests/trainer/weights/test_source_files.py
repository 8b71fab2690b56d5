"""A run whose data has other token ids than its weights is refused at its start; a file written again is the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import ConfigError
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from farspan.trainer.weights.io import Decoder
from farspan.trainer.weights.source_files import check_tokenizer
from tests.support import hugging_face_models as ours
from tests.support import tiny

pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "added_tokens": [{"id": 2, "content": "</s>", "special": True, "lstrip": False}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "post_processor": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 3}, "merges": ["a é"], "ignore_merges": False},
}
MODEL = replace(ours.MODEL, layers=1, vocabulary_size=264)


def with_model(**changes: Any) -> dict[str, Any]:
    return TOKENIZER | {"model": TOKENIZER["model"] | changes}


SAME = {
    "the same bytes": TOKENIZER,
    "sorted": {name: TOKENIZER[name] for name in sorted(TOKENIZER)},
    "merges as pairs": with_model(merges=[["a", "é"]]),
    "without a default": {name: part for name, part in TOKENIZER.items() if name not in ("post_processor", "version")},
    "truncation": TOKENIZER | {"truncation": {"max_length": 8}, "padding": {"length": 4}, "decoder": {"type": "Fuse"}},
}
OTHER = {
    "another vocabulary": with_model(vocab={"a": 1, "é": 0, "aé": 3}),
    "other merges": with_model(merges=[]),
    "another added token": TOKENIZER | {"added_tokens": [{"id": 2, "content": "<eos>", "special": True}]},
    "another pre-tokenizer": TOKENIZER | {"pre_tokenizer": {"type": "Whitespace"}},
    "a start token": TOKENIZER | {"post_processor": {"type": "TemplateProcessing"}},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported weights with the tokenizer."""
    folder = tmp_path_factory.mktemp("imported")
    decoder = Decoder(model=MODEL)
    export_model(ours.save_run(ours.random_model(decoder), decoder, folder / "run"), folder / "theirs")
    (folder / "theirs" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    import_model(folder / "theirs", folder / "weights")
    return folder / "weights"


@pytest.mark.parametrize("name", SAME)
def test_the_same_tokenizer_in_another_form_is_taken(name: str, weights: Path, tiny_data: Path, tmp_path: Path) -> None:
    content = json.dumps(SAME[name], ensure_ascii=name == "the same bytes").encode()
    check_tokenizer(weights, tiny.with_tokenizer(tiny_data, tmp_path / "data", content))


@pytest.mark.parametrize("name", OTHER)
def test_another_tokenizer_is_refused(name: str, weights: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tiny.with_tokenizer(tiny_data, tmp_path / "data", json.dumps(OTHER[name]).encode())
    with pytest.raises(ConfigError, match=r"another tokenizer\.json than the weights .*import the model again"):
        check_tokenizer(weights, data)


def test_older_data_and_bytes_cannot_be_compared(
    weights: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny.with_tokenizer(tiny_data, tmp_path / "data", b"{}")
    meta = json.loads((data / "train" / "meta.json").read_text())
    (data / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError):
        check_tokenizer(weights, data)  # only the hash is left
    del meta["tokenizer_sha256"]
    (data / "train" / "meta.json").write_text(json.dumps(meta))
    check_tokenizer(weights, data)
    assert not caplog.records
    check_tokenizer(weights, tiny_data)
    assert "has bytes as tokens" in caplog.text


def test_a_run_does_not_start_and_does_not_resume_with_another_tokenizer(
    weights: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The data's vocabulary has the same size."""
    same = tiny.with_tokenizer(tiny_data, tmp_path / "same", json.dumps(TOKENIZER, indent=1).encode())
    other = tiny.with_tokenizer(tiny_data, tmp_path / "other", json.dumps(OTHER["a start token"]).encode())
    config = tiny.config(same, tmp_path / "run", ParallelConfig(), steps=3)
    run = replace(config.run, start_from=weights)
    config = replace(config, run=run, model=MODEL, train=replace(config.train, compute_dtype="float32"))
    with_other = replace(config, data=replace(config.data, folder=other))
    with pytest.raises(ConfigError, match=r"prepared with another tokenizer\.json"):
        train(with_other, Ranks(), StopSignal())
    assert not (tmp_path / "run" / "config.toml").exists()
    train(config, Ranks(), StopSignal())
    with pytest.raises(ConfigError, match=r"prepared with another tokenizer\.json"):
        train(replace(with_other, train=replace(config.train, steps=4)), Ranks(), StopSignal())
    # From a checkpoint of that run, too.
    start_from = tmp_path / "run" / "checkpoints" / "step_00000003"
    second = replace(with_other, run=replace(run, folder=tmp_path / "second", start_from=start_from))
    with pytest.raises(ConfigError, match=r"prepared with another tokenizer\.json"):
        train(second, Ranks(), StopSignal())
    train(replace(second, data=config.data), Ranks(), StopSignal())
    assert (tmp_path / "second" / "hugging_face" / "tokenizer.json").read_text() == json.dumps(TOKENIZER)

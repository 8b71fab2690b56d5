import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.errors import ConfigError, DataError
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import Config
from farspan.trainer.data.tokenizer import ByteTokenizer
from farspan.trainer.resolve import choose_device, resolve
from farspan.trainer.toml_config import load_config, to_toml
from tests.support import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(tiny.make_data(tmp_path), tmp_path / "run", ParallelConfig(context=2))


def test_everything_derived_is_written_out(config: Config) -> None:
    open_ended = replace(
        tiny.with_model(config, vocabulary_size=0),
        attention=replace(config.attention, backend="auto"),
        train=replace(config.train, sequences_per_step=3, device="auto"),
    )
    resolved = resolve(open_ended, Ranks(world_size=6)).config
    # 256 bytes and the end token, rounded up to a multiple of 64.
    assert ByteTokenizer().vocabulary_size == 257
    assert resolved.model.vocabulary_size == 320
    assert resolved.parallel.dp_shard == 3
    if not torch.cuda.is_available():
        assert (resolved.train.device, resolved.attention.backend) == ("cpu", "cpu")


def test_a_resolved_configuration_resolves_to_itself(config: Config, tmp_path: Path) -> None:
    resolved = resolve(config, Ranks(world_size=4)).config
    (tmp_path / "config.toml").write_text(to_toml(resolved))
    again = load_config(Config, tmp_path / "config.toml")
    assert again == resolved
    assert resolve(again, Ranks(world_size=4)).config == resolved


@pytest.mark.parametrize(
    ("asked", "num_gpus", "local_rank", "expected"),
    [("cpu", 8, 0, "cpu"), ("auto", 0, 5, "cpu"), ("auto", 2, 1, "cuda:1"), ("cuda", 8, 7, "cuda:7")],
)
def test_device(
    config: Config, monkeypatch: pytest.MonkeyPatch, asked, num_gpus: int, local_rank: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    asking = replace(config, train=replace(config.train, device=asked))
    assert str(choose_device(asking, local_rank)) == expected


@pytest.mark.parametrize(
    ("asked", "num_gpus", "local_rank", "message"),
    [
        ("cuda", 0, 0, "train.device='cuda' but torch sees no GPU: set train.device=cpu"),
        ("cuda", 2, 2, "rank 2 of this machine has no GPU, torch sees 2: start 2 ranks per machine"),
        ("auto", 2, 3, "rank 3 of this machine has no GPU, torch sees 2: start 2 ranks per machine"),
    ],
)
def test_a_gpu_that_is_not_there(
    config: Config, monkeypatch: pytest.MonkeyPatch, asked, num_gpus: int, local_rank: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError) as refused:
        choose_device(replace(config, train=replace(config.train, device=asked)), local_rank)
    assert str(refused.value).startswith(message)


def test_a_vocabulary_that_is_too_small(config: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.vocabulary_size=256 is smaller than the 257 tokens of data\.folder="
    ):
        resolve(tiny.with_model(config, vocabulary_size=256), Ranks(world_size=2))
    resolve(tiny.with_model(config, vocabulary_size=257), Ranks(world_size=2))


def test_a_backend_that_does_not_run_on_the_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    gpu = replace(config, train=replace(config.train, device="cuda"))
    with pytest.raises(ConfigError, match=r"attention\.backend='cpu' cannot run on cuda"):
        resolve(gpu, Ranks(world_size=2))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_is_not_there(config: Config, split: str) -> None:
    shutil.rmtree(config.data.folder / split)
    with pytest.raises(DataError) as refused:
        resolve(config, Ranks(world_size=2))
    assert str(refused.value) == (
        f"data.folder='{config.data.folder}' has no {split}/meta.json: make it with `farspan data prepare`, or name "
        "another."
    )
    shutil.rmtree(config.data.folder)
    with pytest.raises(
        DataError, match=r"^data\.folder='.*tokens' does not exist: make it with `farspan data prepare`"
    ):
        resolve(config, Ranks(world_size=2))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_given_for_the_folder(config: Config, split: str) -> None:
    folder = config.data.folder
    with pytest.raises(DataError) as refused:
        resolve(replace(config, data=replace(config.data, folder=folder / split)), Ranks(world_size=2))
    assert str(refused.value) == f"data.folder='{folder / split}' is one split of the data: set data.folder={folder}."


def test_rules_and_degrees_come_before_the_data(config: Config) -> None:
    shutil.rmtree(config.data.folder)
    with pytest.raises(ConfigError, match=r"must divide the number of ranks, 3"):
        resolve(config, Ranks(world_size=3))
    with pytest.raises(ConfigError, match=r"model\.head_dim=7 must be even"):
        resolve(tiny.with_model(config, head_dim=7), Ranks(world_size=2))

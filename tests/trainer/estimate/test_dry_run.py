import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from farspan.errors import ConfigError, DataError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import Config
from farspan.trainer.resolve import dry_run
from tests.support import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny.config(tmp_path / "tokens", tmp_path / "run", ParallelConfig(context=2))
    return replace(config, train=replace(config.train, sequences_per_step=64))


@pytest.fixture
def output(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="farspan")
    return caplog


@pytest.mark.parametrize("num_ranks", [2, 8, 128])
def test_any_number_of_ranks_one_after_the_other(
    config: Config, output: pytest.LogCaptureFixture, num_ranks: int, tmp_path: Path
) -> None:
    dry_run(config, num_ranks)
    assert f"ranks       {num_ranks} = dp_replicate 1 x dp_shard {num_ranks // 2} x context 2" in output.text
    # 2 x 264 x 32 + 2 layers of 7,760 + 32 in all; over 128 ranks the chunks of rows are no longer even.
    if num_ranks < 128:
        assert f"sharded     {32_448 // num_ranks:,} parameters on rank 0 of {num_ranks}" in output.text
    assert f"nothing was started; {tmp_path / 'tokens'} is not there yet" in output.text
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_replicas_and_float64(config: Config, output: pytest.LogCaptureFixture) -> None:
    dry_run(replace(config, parallel=ParallelConfig(context=2, dp_replicate=2)), 8)
    assert "ranks       8 = dp_replicate 2 x dp_shard 2 x context 2" in output.text
    assert f"sharded     {32_448 // 4:,} parameters on rank 0 of 8" in output.text


def test_data_that_is_there_gives_the_vocabulary(
    config: Config, output: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    unknown = tiny.with_model(config, vocabulary_size=0)
    with pytest.raises(ConfigError, match=r"model\.vocabulary_size=0 .*data\.folder"):
        dry_run(unknown, 2)
    tiny.make_data(tmp_path)
    dry_run(unknown, 2)
    assert "vocabulary 320" in output.text
    assert "is not there yet" not in output.text


def test_a_split_given_for_the_data_is_refused(config: Config, tmp_path: Path) -> None:
    folder = tiny.make_data(tmp_path)
    with pytest.raises(DataError, match=r"is one split of the data: set data\.folder="):
        dry_run(replace(config, data=replace(config.data, folder=folder / "train")), 2)


def test_an_impossible_run_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"must divide the number of ranks, 3"):
        dry_run(config, 3)
    with pytest.raises(ConfigError, match=r"sequences_per_step=64 must be a multiple of the 256"):
        dry_run(config, 512)
    assert not dist.is_initialized()

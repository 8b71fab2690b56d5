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


@pytest.mark.parametrize(("num_ranks", "replicas"), [(2, 1), (8, 1), (8, 2), (128, 1)])
def test_any_number_of_ranks_one_after_the_other(
    config: Config, log: pytest.LogCaptureFixture, num_ranks: int, replicas: int, tmp_path: Path
) -> None:
    dry_run(replace(config, parallel=ParallelConfig(context=2, dp_replicate=replicas)), num_ranks)
    shards = num_ranks // replicas
    degrees = f"dp_replicate {replicas} x dp_shard {shards // 2} x context 2"
    assert f"ranks       {num_ranks} = {degrees}" in log.text
    # 2 x 264 x 32 + 2 layers of 7,760 + 32 in all; over 128 ranks the chunks of rows are no longer even.
    if num_ranks < 128:
        assert f"sharded     {32_448 // shards:,} parameters on rank 0 of {num_ranks}" in log.text
    assert f"nothing was started; {tmp_path / 'tokens'} is not there yet" in log.text
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_there_gives_the_vocabulary(config: Config, log: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    unknown = tiny.with_model(config, vocabulary_size=0)
    with pytest.raises(ConfigError, match=r"model\.vocabulary_size=0 .*data\.folder"):
        dry_run(unknown, 2)
    tiny.make_data(tmp_path)
    dry_run(unknown, 2)
    assert "vocabulary 320" in log.text
    assert "is not there yet" not in log.text


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

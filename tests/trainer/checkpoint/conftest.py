"""A run of two ranks that has saved steps 1 and 2."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, Config
from tests.support import tiny
from tests.support.checkpoint_ranks import Bits, save
from tests.support.rank_pool import Pools


def small(folder: Path, **checkpoint: object) -> Config:
    base = tiny.config(folder / "none", folder / "run", ParallelConfig(context=2))
    return replace(
        base,
        train=replace(base.train, compute_dtype="float32"),
        checkpoint=CheckpointConfig(**checkpoint),  # pyright: ignore[reportArgumentType]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A run's folder, and the bits that each rank saved at steps 1 and 2."""

    run: Path
    bits: list[list[Bits]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, ranks: Pools) -> Written:
    """Written once; tests use copies."""
    config = small(tmp_path_factory.mktemp("checkpoint"))
    return Written(bits=ranks(2).run(save, config, [1, 2]), run=config.run.folder)


@pytest.fixture
def newest(written: Written, config: Config) -> Path:
    """A copy of the written run in the folder of `config`; its newest checkpoint."""
    shutil.copytree(written.run, config.run.folder)
    return config.run.folder / "checkpoints" / "step_00000002"

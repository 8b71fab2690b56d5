"""Real file systems that are full or read-only: all ranks report it, and earlier checkpoints stay."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint import checkpointer, shards
from farspan.trainer.config import Config
from tests.support.checkpoint_ranks import RankState, files, load, same_bits, state_of
from tests.support.durability import syncs_and_renames
from tests.support.rank_pool import Pools
from tests.trainer.checkpoint.conftest import small

SIZE_KB = 2300
"""Room for two checkpoints, not for three."""


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """A run whose folder is a small file system of its own."""
    config = small(tmp_path, keep=3)
    config.run.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KB}k", "none", str(config.run.folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root")
    try:
        yield config
    finally:
        subprocess.run(["umount", "--lazy", str(config.run.folder)], check=True)


def save_until_refused(config: Config, after_two: Callable[[Path], None]) -> tuple[str, list[str], dict]:
    """On a rank: save twice, call `after_two`; return the error of a third save, the files left, the bits saved."""
    rank = RankState(config)
    for step in (1, 2):
        rank.update(step)
        rank.checkpoints.save(state_of(step))
    saved = rank.bits()
    dist.barrier()
    if dist.get_rank() == 0:
        after_two(config.run.folder)
    dist.barrier()
    rank.update(3)
    with pytest.raises(CheckpointError) as refused:
        rank.checkpoints.save(state_of(3))
    dist.barrier()
    return str(refused.value), files(rank.folder), saved


def fill(folder: Path) -> None:
    """Leave room for the shards, and none for index and manifest."""
    with (folder / "filler").open("wb") as file:
        free = os.statvfs(folder)
        file.write(bytes(free.f_bavail * free.f_frsize - 500_000))


def nothing(folder: Path) -> None:
    pass


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def blindly(config: Config, after_two: Callable[[Path], None]) -> tuple[str, list[str], dict]:
    """As `save_until_refused`, by a run that believes there is room: other processes may fill the disk meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1 << 60}))
        return save_until_refused(config, after_two)


@pytest.mark.parametrize(
    ("try_to_save", "after_two", "reason"),
    [
        (save_until_refused, nothing, r"step_00000003 takes [\d.]+ KiB, should leave 1 MiB, and [\d.]+ KiB are free"),
        (blindly, fill, r"step_00000003 cannot be written \(.*No space left on device.*\): make room"),
        (save_until_refused, make_read_only, r"step_00000003 cannot be written \(Read-only file system\): make room"),
    ],
    ids=["no room", "full while writing", "read-only"],
)
def test_earlier_checkpoints_stay(
    config: Config, ranks: Pools, try_to_save: Callable, after_two: Callable, reason: str
) -> None:
    results = ranks(2).run(try_to_save, config, after_two)
    for message, left, _ in results:
        assert message == results[0][0]
        assert re.search(reason, message), message
        assert left == ["step_00000001", "step_00000002"]
    for (_, _, saved), (folder, _, loaded, _) in zip(results, ranks(2).run(load, config), strict=True):
        assert folder == "step_00000002"
        assert same_bits(saved, loaded)


def fail_in_background(config: Config, name: str, failure: BaseException) -> tuple[str, list[str]]:
    """Let one rank's writer fail; return the error and the files left; then save again."""
    rank = RankState(config)
    rank.checkpoints.save(state_of(1))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(f"{shards.__name__}.{name}", mock.Mock(side_effect=failure))
        rank.checkpoints.start_saving(state_of(3))
        while not rank.checkpoints.has_failed:
            time.sleep(0.01)
        with pytest.raises(CheckpointError) as refused:
            rank.checkpoints.finish_saving()
    left = files(rank.folder)
    dist.barrier()
    rank.checkpoints.save(state_of(4))
    return str(refused.value), left


@pytest.mark.parametrize(
    ("name", "failure", "cause"),
    [
        ("_HashedStream.write", OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        ("_HashedStream.write", SystemExit(), "SystemExit()"),
        ("sync", OSError(116, "Stale file handle"), "[Errno 116] Stale file handle"),
    ],
)
def test_all_ranks_learn_of_a_writer_that_fails(
    tmp_path: Path, ranks: Pools, name: str, failure: BaseException, cause: str
) -> None:
    config = small(tmp_path)
    results = ranks(2).run(fail_in_background, config, name, failure)
    for message, left in results:
        assert message == results[0][0]
        assert f"step_00000003 cannot be written ({cause})" in message
        assert left == ["step_00000001"]
    assert files(config.run.folder / "checkpoints") == ["step_00000001", "step_00000004"]


def saved_durably(config: Config) -> list[tuple[str, str]]:
    """On a rank: what a save in the background syncs and renames."""
    rank = RankState(config)
    with syncs_and_renames() as events:
        rank.checkpoints.start_saving(state_of(1))
        rank.checkpoints.finish_saving()
    return events


def test_a_checkpoint_has_its_name_when_it_is_on_the_disk_and_keeps_it(tmp_path: Path, ranks: Pools) -> None:
    first, second = ranks(2).run(saved_durably, small(tmp_path))
    partial, synced = ".step_00000001.partial", [name for kind, name in [*first, *second] if kind == "sync"]
    assert first[-4:] == [
        ("sync", "manifest.json"), ("sync", partial), ("rename", "step_00000001"), ("sync", "checkpoints")
    ]  # fmt: skip
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata.tmp"} <= set(synced)
    # A folder has a file when it is synced after the file was made.
    assert second[-2:] == [("sync", "__1_0.distcp"), ("sync", partial)]

"""Damage of every kind to every file: the newest complete checkpoint is loaded, and one line says why not a newer."""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import FileRecord, Manifest
from farspan.trainer.checkpoint.shards import read_index
from farspan.trainer.checkpoint.verify import check_complete, newest_complete
from farspan.trainer.config import Config
from tests.support.checkpoint_ranks import Bits, files, flip, load, same_bits, walk_back
from tests.support.rank_pool import Pools, error_of
from tests.trainer.checkpoint.conftest import Written

FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]
POSITIONS = 12
"""Bytes of each file that are flipped, one at a time, from the first to the last."""


def positions(num_bytes: int) -> Iterator[int]:
    return (round(i * (num_bytes - 1) / (POSITIONS - 1)) for i in range(POSITIONS))


def walks_back(config: Config, harms: list[tuple[str, str, int]]) -> list[tuple[str | None, Bits, list[str]]]:
    """On a rank: do each harm to the newest checkpoint in turn, load, and undo it."""
    newest, results = config.run.folder / "checkpoints" / "step_00000002", []
    spare = config.run.folder / "spare"
    for name, kind, position in harms:
        if dist.get_rank() == 0:
            shutil.copytree(newest, spare)
            HARM[kind](newest / name, position)
        dist.barrier()
        results.append(walk_back(config))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(newest)
            spare.rename(newest)
        dist.barrier()
    return results


HARM: dict[str, Callable[[Path, int], object]] = {
    "flipped": flip,
    "cut": os.truncate,
    "missing": lambda path, position: path.unlink(),
    "longer": lambda path, position: path.write_bytes(path.read_bytes() + b"\n"),
    "a folder": lambda path, position: (path.unlink(), path.mkdir()),
}


def assert_walked_back(
    results: list[list[tuple[str | None, Bits, list[str]]]], written: Written, newest: Path, harms: list[Any]
) -> None:
    for rank, of_rank in enumerate(results):
        for (folder, bits, lines), harm in zip(of_rank, harms, strict=True):
            assert folder == "step_00000001", harm
            assert same_bits(bits, written.bits[rank][0]), harm
            assert len(lines) == 1, harm
            assert f"checkpoint {newest} is damaged (" in lines[0], harm
            assert harm[0] in lines[0], harm


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(config: Config, newest: Path, written: Written, ranks: Pools, name: str) -> None:
    harms = [(name, "flipped", position) for position in positions((newest / name).stat().st_size)]
    assert_walked_back(ranks(2).run(walks_back, config, harms), written, newest, harms)


def test_files_that_are_cut_or_lost_are_found(config: Config, newest: Path, written: Written, ranks: Pools) -> None:
    cuts = [(name, "cut", length) for name in FILES for length in (0, (newest / name).stat().st_size - 1)]
    harms = [*cuts, *((name, kind, 0) for name in FILES for kind in ("missing", "longer", "a folder"))]
    assert_walked_back(ranks(2).run(walks_back, config, harms), written, newest, harms)


def test_all_damaged_is_no_fresh_start(config: Config, newest: Path, ranks: Pools) -> None:
    for folder in (newest, newest.with_name("step_00000001")):
        flip(folder / "__0_0.distcp", 5000)
    first, second = ranks(2).run(error_of, CheckpointError, load, config)
    assert first == second
    assert f"none of the 2 checkpoints in {newest.parent} can be used" in first


NAME = "model.embedding.weight"


class Payload:
    """Code in place of data: unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._target),)


def with_payload(folder: Path, where: str, target: Path) -> None:
    """Hide code in a checkpoint, with a manifest that agrees with it."""
    metadata = FileSystemReader(folder).read_metadata()
    if where == "index":
        metadata.planner_data = Payload(target)
    else:
        shard = "__0_0.distcp"
        content = (folder / shard).read_bytes()
        torch.save(Payload(target), folder / "code")
        code = (folder / "code").read_bytes()
        (folder / "code").unlink()
        (folder / shard).write_bytes(content + code)
        info = _StorageInfo(shard, len(content), len(code))
        if where == "value":
            metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(NAME)] = info
        else:
            metadata.storage_data |= {index: info for index in metadata.storage_data if index.fqn == NAME}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = Manifest.read(folder)
    others = [path for path in folder.iterdir() if path.name != "manifest.json"]
    Manifest(identity=manifest.identity, train_state=manifest.train_state, files=records(others)).write(folder)


def records(paths: list[Path]) -> dict[str, FileRecord]:
    return {
        path.name: FileRecord(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in paths
    }


@pytest.mark.parametrize("where", ["index", "value", "tensor"])
def test_code_in_a_checkpoint_is_not_run(
    config: Config, newest: Path, ranks: Pools, tmp_path: Path, where: str
) -> None:
    target = tmp_path / "made by the payload"
    with_payload(newest, where, target)
    check_complete(newest)
    for folder, _, lines in ranks(2).run(walk_back, config):
        assert folder == "step_00000001"
        assert len(lines) == 1
    assert not target.exists()
    if where != "tensor":
        with pytest.raises(CheckpointError, match="which no index needs"):
            read_index(newest)


def test_an_index_cannot_lead_elsewhere(newest: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(newest).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../step_00000001/__0_0.distcp"
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names a file elsewhere, \.\./step_00000001"):
        read_index(newest)


def test_one_process_takes_the_newest_complete(newest: Path, log: pytest.LogCaptureFixture) -> None:
    assert newest_complete(newest.parent) == newest
    flip(newest / "__1_0.distcp", 3000)
    assert newest_complete(newest.parent).name == "step_00000001"
    (record,) = log.records
    assert f"checkpoint {newest} is damaged (__1_0.distcp " in record.getMessage()
    shutil.rmtree(newest.with_name("step_00000001"))
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* can be used"):
        newest_complete(newest.parent)
    assert files(newest.parent) == ["step_00000002"]

"""Tensors as files of torch DCP: every rank writes and hashes its own, and reading cannot run code.

DCP reads its index, `.metadata`, and values that are not tensors with an unrestricted pickle.load: a file from someone
else could run anything. This reader allows only DCP's records of tensors in an index.
"""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.serialization import get_crc32_options, set_crc32_options

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import FileRecord
from farspan.trainer.checkpoint.steps import sync
from farspan.trainer.resilience.agreement import raise_on_all_ranks

INDEX = ".metadata"
"""DCP's list of which tensor is where, written after all shards."""

_RECORDS = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_RECORDS, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_RECORDS, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in ("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
Tensors = Mapping[str, Any]
"""Tensors by name, in nested mappings."""


class MisfitError(CheckpointError):
    """Stored tensors have other names or shapes than those to be filled."""


def check_same_tensors(tensors: Tensors, folder: Path) -> None:
    """Raise MisfitError unless `folder` has tensors of these names and shapes, and no others.

    Raises CheckpointError where its index cannot be read.
    """
    _check_same(tensors, read_index(folder))


def _check_same(tensors: Tensors, index: Mapping[str, TensorStorageMetadata]) -> None:
    _check_fits(tensors, index)
    # DCP would leave them out without a word, such as the layers of a deeper model.
    if unused := sorted(index.keys() - _names(tensors)):
        raise MisfitError(f"{unused[0]} has no place in it")


def write_shards(tensors: Tensors, folder: Path, group: dist.ProcessGroup | None = None) -> dict[str, FileRecord]:
    """Write this rank's shards of `tensors` durably; return size and hash of each file by its name.

    Every rank of `group` makes the same call; one of them writes a replica. Raises CheckpointError, on all of them,
    when one cannot write.
    """
    # Tensors are on the CPU. To copy ahead, DCP would synchronize with a GPU: device 0, as this thread has set none.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.fs = files = _HashedFiles()
    # CRCs of each tensor would take as long again as the SHA-256 of the file, which is stronger.
    crc_option = get_crc32_options()
    set_crc32_options(False)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_causes(error)) from None
    finally:
        set_crc32_options(crc_option)
    return files.written


def read_shards(tensors: Tensors, folder: Path, *, has_others: bool = True) -> None:
    """Fill `tensors`, sharded or not, from the tensors of these names in `folder`; every rank makes the same call.

    has_others: whether `folder` may have tensors of other names. Raises MisfitError, on all ranks, when it has some but
    may not, or when a tensor is missing or has another shape, and CheckpointError when one cannot be read.
    """
    reader, check = raise_on_all_ranks(lambda: _SafeReader(folder)), _check_fits if has_others else _check_same
    raise_on_all_ranks(lambda: check(tensors, _stored_tensors(reader)))
    _fill(tensors, reader)


def read_alone(tensors: Tensors, folder: Path) -> None:
    """As `read_shards` with full tensors, on this rank, whatever the others do, if there are any."""
    reader = _SafeReader(folder)
    _check_fits(tensors, _stored_tensors(reader))
    with warnings.catch_warnings():
        # That it takes this for a single process, as it should.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        _fill(tensors, reader, alone=True)


def _fill(tensors: Tensors, reader: "_SafeReader", *, alone: bool = False) -> None:
    try:
        load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(_causes(error)) from None


def read_index(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape and dtype of each stored tensor; raises CheckpointError where the index cannot be read."""
    return _stored_tensors(_SafeReader(folder))


def misfit(name: str, stored: TensorStorageMetadata | None, shape: torch.Size) -> str | None:
    """Return why a stored tensor cannot fill one of this name and shape; None if it can."""
    if stored is None:
        return f"{name} is missing"
    return None if stored.size == shape else f"{name} has shape {list(stored.size)}, not {list(shape)}"


def _stored_tensors(reader: "_SafeReader") -> dict[str, TensorStorageMetadata]:
    # The reader lets no other records pass.
    return cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)


def _check_fits(tensors: Tensors, index: Mapping[str, TensorStorageMetadata], prefix: str = "") -> None:
    for name, tensor in tensors.items():
        full_name = f"{prefix}{name}"
        if isinstance(tensor, Mapping):
            _check_fits(tensor, index, f"{full_name}.")
        elif problem := misfit(full_name, index.get(full_name), tensor.shape):
            raise MisfitError(problem)


def _names(tensors: Tensors, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, tensor in tensors.items():
        found |= _names(tensor, f"{prefix}{name}.") if isinstance(tensor, Mapping) else {f"{prefix}{name}"}
    return found


class _HashedFiles(FileSystem):
    """Hashes each file while writing it."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with _HashedStream(path, mode) as stream:
            yield stream
        # Sync in here, so that DCP raises a failure on all ranks.
        sync(Path(path).parent)
        self.written[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.BufferedWriter):
    """A file that is written from start to end, and hashed."""

    def __init__(self, path: str | os.PathLike, mode: str) -> None:
        super().__init__(io.FileIO(path, mode))
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, buffer: Any, /) -> int:
        self._digest.update(buffer)
        written = super().write(buffer)
        self._bytes += written
        return written

    def fileno(self) -> int:
        # DCP asks for it to fsync, and does not flush first.
        self.flush()
        return super().fileno()

    def record(self) -> FileRecord:
        return FileRecord(bytes=self._bytes, sha256=self._digest.hexdigest())


class _SafeReader(FileSystemReader):
    """Reads tensors and no other objects; raises CheckpointError for an index that it cannot read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            with (folder / INDEX).open("rb") as file:
                self._index: Metadata = _IndexUnpickler(file).load()
                paths = {info.relative_path for info in self._index.storage_data.values()}
                outside = [path for path in paths if Path(path).name != path]
        except CheckpointError:
            raise
        # Damaged bytes make pickle raise almost any exception.
        except Exception as error:
            raise CheckpointError(f"{INDEX} is unreadable: {error}") from None
        if outside:
            raise CheckpointError(f"{INDEX} names a file elsewhere, {min(outside)}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise CheckpointError(f"{INDEX} asks for {module_name}.{global_name}, which no index needs")
        return super().find_class(module_name, global_name)


def _causes(error: CheckpointException) -> str:
    return "; ".join(
        sorted({" ".join(str(failure[0]).split()) or repr(failure[0]) for failure in error.failures.values()})
    )

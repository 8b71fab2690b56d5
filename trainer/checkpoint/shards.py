"""Tensors as files of torch DCP: every rank writes and hashes its own, and nothing that is read can run code.

DCP reads its index, `.metadata`, by an unrestricted pickle.load, and values that are no tensors likewise: a file that
somebody else wrote could do anything. Here an index may name nothing but DCP's records of tensors.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

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
"""DCP's list of which tensor is where; it writes it when all shards are written."""

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
"""Tensors by name, in mappings of mappings."""


def write_shards(tensors: Tensors, folder: Path, group: dist.ProcessGroup | None = None) -> dict[str, FileRecord]:
    """Write this rank's part of `tensors` durably; return what it wrote, by the names of the files.

    Every rank of `group` makes the same call; a replica is written by one of them. Raises CheckpointError, on all of
    them, when one cannot write.
    """
    # All is on the CPU. To copy ahead, DCP would wait for a GPU, in a thread that has not chosen one: for the first.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.fs = files = _HashedFiles()
    # A weaker sum of each tensor beside that of the file would take as long again.
    sums = get_crc32_options()
    set_crc32_options(False)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_causes(error)) from None
    finally:
        set_crc32_options(sums)
    return files.written


def read_shards(tensors: Tensors, folder: Path) -> None:
    """Fill `tensors`, sharded or not, with what `folder` holds under their names; every rank makes the same call.

    Raises CheckpointError, on all ranks, when one of them cannot be read or has another shape.
    """
    reader = raise_on_all_ranks(lambda: _SafeReader(folder))
    try:
        load(dict(tensors), storage_reader=reader)
    except CheckpointException as error:
        raise CheckpointError(_causes(error)) from None


def read_index(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape, dtype and the like of each stored tensor; raises CheckpointError where that cannot be read."""
    return cast(dict[str, TensorStorageMetadata], _SafeReader(folder).read_metadata().state_dict_metadata)


class _HashedFiles(FileSystem):
    """Hashes what is written to each file on its way."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with open(path, mode) as file:
            stream = _HashedStream(cast(IO[bytes], file))
            yield stream
        # Here, as DCP tells all ranks of what goes wrong on one.
        sync(Path(path).parent)
        self.written[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.IOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._bytes += view.nbytes
        return self._file.write(view)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        # Whoever asks wants to sync the file, and DCP does not flush it before.
        self._file.flush()
        return self._file.fileno()

    def record(self) -> FileRecord:
        return FileRecord(bytes=self._bytes, sha256=self._digest.hexdigest())


class _SafeReader(FileSystemReader):
    """Reads tensors, and no objects of other kinds; raises CheckpointError for an index that it cannot read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            with (folder / INDEX).open("rb") as file:
                self._index: Metadata = _IndexUnpickler(file).load()
                outside = {place.relative_path for place in self._index.storage_data.values() if _is_outside(place)}
        except CheckpointError:
            raise
        # Damaged bytes make pickle raise nearly anything.
        except Exception as error:
            raise CheckpointError(f"{INDEX} is unreadable: {error}") from None
        if outside:
            raise CheckpointError(f"{INDEX} names a file elsewhere, {min(outside)}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def _is_outside(place: Any) -> bool:
    return Path(place.relative_path).name != place.relative_path


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise CheckpointError(f"{INDEX} asks for {module_name}.{global_name}, which no index needs")
        return super().find_class(module_name, global_name)


def _causes(error: CheckpointException) -> str:
    """Return what went wrong on any rank, each cause once."""
    return "; ".join(
        sorted({" ".join(str(failure[0]).split()) or repr(failure[0]) for failure in error.failures.values()})
    )

"""Folders of safetensors: one file, or several with an index."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from farspan.errors import CheckpointError, ConfigError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class TensorFiles:
    """Tensors of a folder by name, memory-mapped.

    dtypes: as stored, of each that was read, as in `config.json`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """List the tensors; raises CheckpointError where a file is missing or damaged. dtype: of what is returned."""
        self._folder, self._dtype, self._safetensors = folder, dtype, _import_safetensors()
        self.dtypes: dict[str, str] = {}
        # As transformers: one file comes before an index that another version may have left.
        has_index = (folder / INDEX).is_file() and not (folder / ONE_FILE).is_file()
        self._files = self._indexed() if has_index else self._of_single_file()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Return one tensor; raises CheckpointError where it is missing, quantized or of another shape.

        Raises ConfigError where its numbers do not fit the dtype.
        """
        if name not in self._files:
            raise CheckpointError(f"{self._folder} has no tensor {name}: download or save the model again.")
        tensor = self.raw(name)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{self._folder} has {name} in {tensor.dtype}, which is quantized: take weights in bfloat16 or float32."
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self._folder} has {name} of shape {list(tensor.shape)}, not {list(shape)} as in its config.json: "
                "download or save the model again."
            )
        return converted(tensor, name, self._dtype, self._folder)

    def raw(self, name: str) -> Tensor:
        """Return a tensor that is there, as it is stored; raises CheckpointError for a dtype that torch lacks."""
        tensor = self._read(self._files[name], name)
        self.dtypes[name] = name_of(tensor.dtype)
        return tensor

    def _read(self, file: Any, name: str) -> Tensor:
        try:
            return file.get_tensor(name)
        except self._safetensors.SafetensorError as error:
            raise CheckpointError(
                f"{self._folder} has {name}, which torch cannot read ({error}): take weights in bfloat16 or float32."
            ) from None

    def _of_single_file(self) -> dict[str, Any]:
        if not (self._folder / ONE_FILE).is_file():
            raise CheckpointError(
                f"{self._folder} has neither {ONE_FILE} nor {INDEX}: save the model as safetensors there."
            )
        file = self._opened(ONE_FILE)
        return dict.fromkeys(file.keys(), file)

    def _indexed(self) -> dict[str, Any]:
        try:
            file_of = json.loads((self._folder / INDEX).read_text())["weight_map"]
            files = {name: self._opened(name) for name in sorted(set(file_of.values()))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._folder / INDEX} is damaged ({error}): download it again.") from None
        tensors = {name: set(file.keys()) for name, file in files.items()}
        for tensor, name in file_of.items():
            if tensor not in tensors[name]:
                raise CheckpointError(
                    f"{self._folder / name} lacks {tensor}, which is there by {INDEX}: download it again."
                )
        # As transformers, take what lies in the files, whether the index lists it or not.
        found: dict[str, str] = {}
        for name, contained in tensors.items():
            for tensor in contained:
                first = found.setdefault(tensor, name)
                if first != name and not are_equal(*(self._read(files[each], tensor) for each in (first, name))):
                    raise CheckpointError(
                        f"{self._folder / name} and {first} have different numbers in {tensor}: download the model "
                        "again into an empty folder."
                    )
        return {tensor: files[name] for tensor, name in found.items()}

    def _opened(self, name: str) -> Any:
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, and {INDEX} names it: download it again.")
        try:
            return self._safetensors.safe_open(path, framework="pt")
        except self._safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}): download or save it again.") from None


def are_equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in `config.json`."""
    return str(dtype).removeprefix("torch.")


def converted(tensor: Tensor, name: str, dtype: torch.dtype | None, folder: Path) -> Tensor:
    """Return a tensor of the model in `folder` in another dtype, None for its own.

    Raises CheckpointError for numbers that are not finite, ConfigError where they are too large or small for the dtype.
    """
    if not tensor.isfinite().all():
        raise CheckpointError(f"{folder} has numbers in {name} that are not finite: take other weights.")
    if dtype is None or dtype == tensor.dtype:
        return tensor
    result = tensor.to(dtype)
    is_lost = tensor.any() and not result.any()
    if is_lost or not result.isfinite().all():
        largest, turned_into = f"{tensor.abs().max().item():.3g}", "0" if is_lost else "infinity"
        raise ConfigError(
            f"{folder} has numbers up to {largest} in {name}, which --dtype {name_of(dtype)} turns into {turned_into}: "
            "choose another --dtype, or leave it out."
        )
    return result


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors in the format of safetensors."""
    return _import_safetensors().torch.save(dict(tensors))


def from_bytes(content: bytes) -> dict[str, Tensor]:
    return _import_safetensors().torch.load(content)


def write_tensors(
    sizes: Mapping[str, int], read: Callable[[list[str]], Mapping[str, Tensor]], folder: Path, *, file_bytes: int
) -> None:
    """Write tensors into files of at most `file_bytes` where each fits in one; raises OSError.

    sizes: bytes of each, in the order of the files. read: returns the tensors of these names; called once for each
    file, so that no more than those are in memory.
    """
    safetensors = _import_safetensors()
    files = list(_files(sizes, file_bytes))
    total, file_of = sum(sizes.values()), {}
    for number, names in enumerate(files, start=1):
        file = ONE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            safetensors.torch.save_file(dict(read(names)), folder / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from None
        file_of |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _files(sizes: Mapping[str, int], file_bytes: int) -> Iterator[list[str]]:
    names, filled = [], 0
    for name, size in sizes.items():
        if names and filled + size > file_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("Files of Hugging Face need the package safetensors: `pip install -e '.[hf]'`.") from None
    return safetensors

"""A stand-in for DeepSpeed's async_io, which takes minutes to compile: the same calls, done at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

SMALLEST = 1024
"""Bytes of the smallest tensor that goes to NVMe; DeepSpeed takes a MiB."""


class Handle:
    pinned: ClassVar[dict[int, int]] = {}
    """The bytes of each pinned buffer, by its address."""

    def __init__(self, **options: object) -> None:
        self._done = 0

    def new_cpu_locked_tensor(self, size: int, like: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((size,), torch.nan, dtype=like.dtype)
        self.pinned[buffer.data_ptr()] = buffer.nbytes
        return buffer

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> None:
        del self.pinned[buffer.data_ptr()]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + size for start, size in self.pinned.items())

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        stored = np.fromfile(path, dtype=np.uint8, count=buffer.nbytes, offset=offset)
        buffer.view(torch.uint8).copy_(torch.from_numpy(stored))
        self._done += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        assert self.is_pinned(buffer)
        assert offset == 0
        Path(path).write_bytes(buffer.view(torch.uint8).numpy().tobytes())
        self._done += 1
        return 0

    def sync_pread(self, buffer: torch.Tensor, path: str, offset: int = 0) -> int:
        self.async_pread(buffer, path, offset)
        return self.wait()

    def wait(self) -> int:
        done, self._done = self._done, 0
        return done


def on_nvme(folder: Path) -> dict[str, Any]:
    """Return settings of ZeRO that have all there that can be."""
    nvme = {"device": "nvme", "nvme_path": str(folder)}
    # Buffers for all parameters that are gathered at a time; by itself DeepSpeed keeps in memory what fits there.
    buffers = {"buffer_size": 20_000, "buffer_count": 30, "max_in_cpu": 0}
    return {"offload_optimizer": nvme, "offload_param": nvme | buffers}


def replace_async_io() -> None:
    """Let DeepSpeed read and write by the stand-in in this process from now on, and small tensors as well."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from deepspeed.runtime.swap_tensor import aio_config, optimizer_utils, partitioned_param_swapper

    AsyncIOBuilder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=Handle)
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = SMALLEST
    aio_config.AIO_DEFAULT_DICT["block_size"] = SMALLEST

"""Rows so far apart that their places do not fit 32 bits, as of millions of tokens, in memory of a few pages."""

import mmap

import torch
from torch import Tensor

ROW_STRIDE = 1 << 25
"""Rows within a tile, of which kernels expect 64 at most here, are less than 2^31 elements apart."""


def far_rows(x: Tensor) -> Tensor:
    """Return a copy of x `[rows, ...]`, of more than 65 rows; the last ones start beyond 2^31 elements."""
    assert len(x) > 65
    memory = mmap.mmap(-1, len(x) * ROW_STRIDE * x.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A huge page for each row would take 2 MiB.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    strides = (ROW_STRIDE, *x[0].contiguous().stride())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)

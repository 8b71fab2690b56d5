"""Where layers between matrix products run as one kernel each."""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take these tensors: on a GPU, not float64, and outside of torch.compile.

    torch.compile fuses torch's own operators with all that surrounds them, and its kernels are better for that.
    """
    return on_gpu(tensors[0]) and all(x.dtype in DTYPES for x in tensors) and not torch.compiler.is_compiling()


def on_gpu(x: Tensor) -> bool:
    """Whether kernels are launched for x; tests let an interpreter run them."""
    return x.is_cuda

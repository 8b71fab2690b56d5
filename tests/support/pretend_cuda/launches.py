# pyright: reportMissingImports=false
"""Triton launches with pretend tensors: counted, and computed by Triton's interpreter where the device runs kernels."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.support.pretend_cuda.counts import Kind
from tests.support.pretend_cuda.tensor import PretendDevice, PretendTensor
from tests.support.triton_folder import FOLDER

CHOOSING = {"block_choice", "block_means", "chunked_choice", "joint_choice", "row_lists"}
"""Modules of kernels that choose blocks, and list who chose them."""


def install() -> None:
    """Count launches in this process, whose environment has TRITON_INTERPRET=1; it has imported no kernel yet."""
    sys.path.insert(0, str(FOLDER))
    from triton.runtime import interpreter

    from tests.support import triton_interpreter

    triton_interpreter.patch()
    run = interpreter.InterpretedFunction.run

    def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        device = PretendDevice.current
        if device is None:
            return run(kernel, *arguments, grid=grid, warmup=warmup, **options)
        name = kernel.fn.__name__
        with device.counts.inside():
            device.counts.add(Kind.LAUNCH, name)
            values = [_value(argument, name) for argument in arguments]
            named = {key: _value(argument, name) for key, argument in options.items()}
            chooses = kernel.fn.__module__.rpartition(".")[2] in CHOOSING
            if device.runs_choices if chooses else device.runs_kernels:
                run(kernel, *values, grid=grid, warmup=warmup, **named)

    interpreter.InterpretedFunction.run = launch

    from farspan.kernels.triton_kernels import joint_choice_launch

    # The interpreter takes as long for a program of any size.
    joint_choice_launch.QUERIES = 128


def _value(argument: Any, kernel: str) -> Any:
    """Return an argument, such as a named tuple of tensors, with the tensors that pretend ones hold."""
    if isinstance(argument, PretendTensor):
        argument.work.check()
        return argument.value
    if isinstance(argument, Tensor):
        raise RuntimeError(f"{kernel} is given a tensor {tuple(argument.shape)} of the CPU")
    if isinstance(argument, tuple):
        parts: Sequence[Any] = [_value(part, kernel) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return argument

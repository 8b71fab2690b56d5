"""What torch.compile leaves as it is."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep a function out of the graphs of `train.compile`: it communicates, or what it does depends on content."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]

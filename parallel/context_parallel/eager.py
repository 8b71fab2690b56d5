"""What torch.compile leaves as it is."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep a function out of the graphs of torch.compile: it communicates, or what it does depends on content."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        # Disabled only where it is traced: to disable imports torch._dynamo, which takes seconds.
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **named)
        return function(*arguments, **named)

    return cast(Function, call)

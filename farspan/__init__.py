"""farspan: train language models on long context, any attention under any context parallelism.

    import farspan

    out = farspan.attention(q, k, v, mechanism="moba", documents=[3000, 1096])

docs/api.md has the names below, each with an example.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "farspan/kernels is not a folder: the links inside farspan/ were lost when the repository was copied; "
        "clone it with git, or copy it with 'cp -a', 'rsync -a' or 'tar'."
    )

if TYPE_CHECKING:
    from farspan import testing as testing
    from farspan.parallel.context_parallel.api import (
        ContextParallel,
        attention,
        mechanism,
        register_mechanism,
        shard,
        unshard,
    )
    from farspan.trainer.inference.language_model import load

__all__ = ["ContextParallel", "attention", "load", "mechanism", "register_mechanism", "shard", "unshard"]

_ELSEWHERE = {"load": "farspan.trainer.inference.language_model"}
"""Modules of names that are not in the first one."""


def __getattr__(name: str) -> Any:
    """Import what a name needs once it is asked for: commands that only print start without torch."""
    if name == "testing":
        return import_module("farspan.testing")
    if name not in __all__:
        raise AttributeError(f"module 'farspan' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "farspan.parallel.context_parallel.api")), name)

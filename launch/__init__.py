"""Launching runs: the command line, and `farspan.launch.submit` with `submit_sweep` for Python and notebooks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farspan.launch.submitit_jobs import RunResult, submit, submit_sweep

__all__ = ["RunResult", "submit", "submit_sweep"]


def __getattr__(name: str) -> Any:
    """Import what a name needs once it is asked for, as in `farspan` itself."""
    if name not in __all__:
        raise AttributeError(f"module 'farspan.launch' has no attribute {name!r}")
    from farspan.launch import submitit_jobs

    return getattr(submitit_jobs, name)

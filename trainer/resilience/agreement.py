"""Agreement of all ranks: what one rank finds out all ranks learn, so that none waits for one that has given up.

Inside a run all ranks raise the same FarspanError.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from farspan.errors import ConfigError, FarspanError, file_errors_reported, shortened

T = TypeVar("T")


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work`, which waits for no other rank, on every rank; if it raises a FarspanError on one, all raise it."""
    result: T | None = None
    own_error: FarspanError | None = None
    try:
        with file_errors_reported():
            result = work()
    except FarspanError as error:
        own_error = error
    if any_rank(own_error is not None):
        errors = all_gather_objects(own_error)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        where = "" if len({str(e) for e in errors}) == 1 else f"rank {rank}: "
        raise type(error)(f"{where}{error}") from own_error
    return result  # pyright: ignore[reportReturnType]


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `work` on rank 0 only; return its result, or raise its FarspanError, on every rank.

    group: one of all ranks, for calls beside those of another thread; the world by default.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            with file_errors_reported():
                outcome[0] = work()
        except FarspanError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, error = outcome
    if error is not None:
        raise error
    return result


def any_rank(flag: bool) -> bool:
    """Return on every rank whether `flag` is true on some rank."""
    return bool(max_over_ranks([flag])[0])


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """Return on every rank the largest value of any rank, for each of the values."""
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def check_same(values: Mapping[str, object]) -> None:
    """Raise ConfigError on every rank unless each value, given by its name, equals that of rank 0."""
    by_rank = all_gather_objects(dict(values))
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                ours, theirs = shortened(repr(first.get(name))), shortened(repr(other.get(name)))
                raise ConfigError(
                    f"{name} differs between ranks, {ours} on rank 0 and {theirs} on rank {rank}: start all with the "
                    "same command, on equal machines that have the same files."
                )


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, or of those of a group."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered

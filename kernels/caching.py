"""What is made once and found again: tables that depend on rows and masks alone, under keys of their users' own."""

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar

Made = TypeVar("Made")


def once(cache: MutableMapping[Any, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    """Return what `make` returned when the key was first asked for; threads that ask at once may all make it."""
    if key not in cache:
        cache[key] = make()
    return cache[key]

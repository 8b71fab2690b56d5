"""What the tools' command lines have in common."""

import sys
from collections.abc import Callable, Iterable

from farspan.errors import FarspanError


def print_all(find: Callable[[], Iterable[object]]) -> int:
    """Print what is found, a line each; return the exit status: 2 for an error that the caller can mend, said so."""
    try:
        for line in find():
            print(line)
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

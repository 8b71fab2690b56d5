"""What is on record of a run, step by step: a file that is read without torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each record of a run and the bytes of its line, up to one that is unreadable or was cut short."""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            # A line without its end was cut short, even where it reads well.
            if not isinstance(record["step"], int) or not line.endswith(b"\n"):
                return
        except (ValueError, KeyError, TypeError):
            return
        yield record, len(line)

"""What a device would have been asked to do, by source line."""

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from types import FrameType
from typing import NamedTuple

from tests.support.sources import ROOT

OWN = (f"{ROOT}/tests", f"{ROOT}/.venv")
CALLERS = 2
"""Source lines that an event is known by: the innermost one and its caller."""


class Kind(StrEnum):
    SYNC = "synchronizations"
    TO_HOST = "copies to the host"
    PAGEABLE = "pageable copies to the device"
    PINNED = "pinned copies to the device"
    OPERATION = "operations"
    LAUNCH = "Triton launches"
    COLLECTIVE = "collectives"


DEVICE_WORK = (Kind.OPERATION, Kind.LAUNCH, Kind.TO_HOST, Kind.PAGEABLE, Kind.PINNED)
"""What the host puts into the device's queue: each costs it some microseconds, whatever its size."""
HOST_WAITS = (Kind.SYNC, Kind.TO_HOST, Kind.PAGEABLE)


class Part(StrEnum):
    """Where in a step."""

    FORWARD = "attention forward"
    BACKWARD = "attention backward"
    REST = "all else"


class Event(NamedTuple):
    part: Part
    again: bool
    """Whether the part has passed before, as in a second layer, which finds what is made once for a sequence."""
    kind: Kind
    name: str
    """Of the operator or kernel."""
    line: str
    """Where in farspan: `file:line < file:line of its caller`."""


@dataclass
class Counts:
    """host_s: the host's own seconds in each pass of a part, without operators, which a device would compute."""

    events: Counter[Event] = field(default_factory=Counter)
    nbytes: Counter[Event] = field(default_factory=Counter)
    host_s: dict[Part, list[float]] = field(default_factory=lambda: {part: [] for part in Part})
    part: Part = Part.REST
    # Of each thread.
    _inside_s: dict[int, float] = field(default_factory=partial(defaultdict, float))
    _depth: Counter[int] = field(default_factory=Counter)

    def add(self, kind: Kind, name: str, nbytes: int = 0) -> None:
        event = Event(self.part, bool(self.host_s[self.part]), kind, name, source_line(sys._getframe(1)))
        self.events[event] += 1
        self.nbytes[event] += nbytes

    def number(self, part: Part, *kinds: Kind) -> int:
        """Return how many events are of these kinds."""
        return sum(n for event, n in self.events.items() if event.kind in kinds and event.part is part)

    def waiting(self, *parts: Part) -> list[str]:
        """Return what makes the host wait in these parts, and where."""
        return [f"{e.kind}: {e.line}" for e in self.events if e.kind in HOST_WAITS and e.part in parts]

    def first_number(self, part: Part, *kinds: Kind) -> int:
        """Return how many events are of these kinds in the first pass."""
        return sum(
            n for event, n in self.events.items() if event.kind in kinds and event.part is part and not event.again
        )

    def later_number(self, part: Part, *kinds: Kind) -> int:
        """Return how many events are of these kinds in a pass after the first one; rounded up, if they differ."""
        number = sum(
            n for event, n in self.events.items() if event.kind in kinds and event.part is part and event.again
        )
        return -(-number // max(len(self.host_s[part]) - 1, 1))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside the block, the device computes."""
        start, thread = time.thread_time(), threading.get_ident()
        self._depth[thread] += 1
        try:
            yield
        finally:
            self._depth[thread] -= 1
            if not self._depth[thread]:
                self._inside_s[thread] += time.thread_time() - start

    @contextmanager
    def in_part(self, part: Part) -> Iterator[None]:
        """Inside the block, all counts as a pass of this part; parts may be nested, as in recomputation."""
        outer, self.part = self.part, part
        thread = threading.get_ident()
        start = time.thread_time() - self._inside_s[thread]
        try:
            yield
        finally:
            self.part = outer
            self.host_s[part].append(time.thread_time() - self._inside_s[thread] - start)

    def lines(self, most: int = 30) -> Iterator[str]:
        """Yield a report: what the host waits for first, then the most frequent."""
        for part in Part:
            times = self.host_s[part]
            spent = f", host {1000 * sum(times) / len(times):.1f} ms in each of {len(times)} passes" if times else ""
            yield f"--- {part}: {self.number(part, *DEVICE_WORK)} pieces of work for the device{spent}"
            for kind in Kind:
                found = [(n, event) for event, n in self.events.items() if event.kind is kind and event.part is part]
                if found:
                    yield f"{sum(n for n, _ in found):6d}  {kind}"
                for n, event in sorted(found, key=lambda item: -item[0])[:most]:
                    size = f" {self.nbytes[event] / 1e6:9.3f} MB" if self.nbytes[event] else ""
                    yield f"{n:12d}  {event.name:36s}{size}  {event.line}"


def source_line(frame: FrameType | None) -> str:
    """Return the innermost lines of farspan; without any, what autograd runs by itself."""
    found: list[str] = []
    while frame is not None and len(found) < CALLERS:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and not path.startswith(OWN):
            found.append(f"{path.removeprefix(f'{ROOT}/').removeprefix('farspan/')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "autograd"

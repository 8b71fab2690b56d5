"""Stop requests: a first signal asks for a save and a clean exit, a later one ends the process at once."""

import signal
import time
from types import FrameType

SAME_REQUEST_S = 3.0
"""A terminal and torchrun may both deliver one Ctrl-C: signals this close together are one request."""


class StopSignal:
    """Remembers that this process was asked to stop; the ranks agree on it at the next step."""

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def requested(self) -> bool:
        return self._first is not None

    def install(self) -> None:
        """Catch SIGINT (Ctrl-C) and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

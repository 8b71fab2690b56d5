"""Stop requests: a first signal asks for a save and a clean exit, a later one ends the process at once.

SIGUSR1 is how a scheduler warns of the end of a job's time, or of a job that goes first: the run wants to go on later.
A launcher blocks these signals while it starts ranks and the ranks inherit that, so that one that comes before a rank
can act on it waits instead of killing the rank.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

WARNING_SIGNAL = signal.SIGUSR1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, WARNING_SIGNAL)
EXIT_USER_ERROR = 2
"""Exit status of a run that ended with one sentence about what the user can mend."""
EXIT_WARNED = 75
"""Exit status of a run that a scheduler's warning stopped: it has saved and wants to go on (EX_TEMPFAIL)."""
EXIT_HUNG = 76
"""Exit status of a run in which something took longer than it may: all ranks have written their stacks."""
EXIT_UNFIT = 77
"""Exit status of a run that has found, before its start, that a node cannot take part."""
UNFIT_FILE = "unfit"
"""Where it says which: lines of a host and why, in the run's folder."""
KILLED = 128
"""A process that died of signal n counts as exit status 128 + n, as shells have it."""
SAME_REQUEST_S = 3.0
"""A terminal and torchrun may both deliver one Ctrl-C: signals this close together are one request."""

Action = Callable[[int], object]


def announce(number: int) -> None:
    """Say what happens next, by the one way of writing that is safe inside a signal handler."""
    again = f"Ctrl-C again after {SAME_REQUEST_S:g} seconds to end at once"
    with suppress(OSError):  # The terminal may be gone.
        os.write(2, f"\nstopping    after this step, with a checkpoint; {again}\n".encode())


def end_at_once(number: int) -> None:
    """Die of the signal, as if nothing had caught it."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.Signals(number))


class StopSignal:
    """Catches SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 for the time of a `with` block.

    SIGHUP stays ignored where it was, which is what nohup asks for.
    first: called on the first signal. again: called on a signal that comes later than SAME_REQUEST_S.
    """

    def __init__(self, *, first: Action = announce, again: Action = end_at_once) -> None:
        self._first, self._again = first, again
        self._requested_at: float | None = None
        self._warned = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._requested_at is not None

    @property
    def warned(self) -> bool:
        """Whether a scheduler gave this process a warning."""
        return self._warned

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._catch)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._warned |= number == WARNING_SIGNAL
        if self._requested_at is None:
            self._requested_at = now
            self._first(number)
        elif now - self._requested_at > SAME_REQUEST_S and number != WARNING_SIGNAL:
            self._again(number)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Hold stop signals back for the time of the block; processes started in it go on holding them back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

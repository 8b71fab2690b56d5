"""Stop requests: a first signal asks for a save and a clean exit, a later one ends the process at once.

With SIGUSR1 a scheduler warns that it is about to end the job, at its time limit or for another job: the run should be
queued again. A launcher blocks these signals while it starts ranks and the ranks inherit that, so that a signal that
comes before a rank can act on it waits instead of killing the rank.
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
EXIT_FAILED = 1
"""Exit status of a failure that another start may not have."""
EXIT_USER_ERROR = 2
"""Exit status of a run that ended with one sentence about what the user can fix."""
EXIT_WARNED = 75
"""Exit status of a run that a preemption warning stopped: it has saved and should be queued again (EX_TEMPFAIL)."""
EXIT_HUNG = 76
"""Exit status of a run that the watchdog ended: ranks have written their stacks."""
EXIT_UNFIT = 77
"""Exit status of a run that a bad node kept from starting."""
UNFIT_FILE = "unfit"
"""The file in the run's folder that lists bad nodes: a line for each host, with the reason."""
KILLED = 128
"""A process that signal n killed counts as exit status 128 + n, as in shells."""
INTERRUPTED = KILLED + signal.SIGINT
"""Exit status of a command that a signal has stopped."""
SAME_REQUEST_S = 3.0
"""A terminal and torchrun may both deliver one Ctrl-C: signals this close together are one request."""

Action = Callable[[int], object]


def announce(number: int) -> None:
    """Print what happens next, with the one call that may write inside a signal handler."""
    again = f"Ctrl-C again after {SAME_REQUEST_S:g} seconds to end at once"
    with suppress(OSError):  # The terminal may be gone.
        os.write(2, f"\nstopping    after this step, with a checkpoint; {again}\n".encode())


def end_at_once(number: int) -> None:
    """Die of the signal, as if nothing had caught it."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.Signals(number))


def stopped_at_once() -> "StopSignal":
    """Return a StopSignal that ends the process, for blocks that import: these may swallow the exception of Ctrl-C."""
    return StopSignal(first=lambda number: os._exit(INTERRUPTED))


class StopSignal:
    """Catches SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 inside a `with` block.

    SIGHUP stays ignored where it was, as nohup asks for.
    first: called on the first signal. again: called on a signal more than SAME_REQUEST_S later.
    """

    def __init__(self, *, first: Action = announce, again: Action = end_at_once) -> None:
        self._first, self._again = first, again
        self._requested_at: float | None = None
        self._preemption_warning = False
        self._before: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._requested_at is not None

    @property
    def preemption_warning(self) -> bool:
        """Whether a scheduler warned this process of the job's end."""
        return self._preemption_warning

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._catch)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        # Before the handlers: where signals were blocked, no other handler gets one.
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self) -> None:
        """Ask for a stop as SIGTERM does, unless one was asked for: it never is the request to end at once."""
        if not self.requested:
            self._catch(signal.SIGTERM, None)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._preemption_warning |= number == WARNING_SIGNAL
        if self._requested_at is None:
            self._requested_at = now
            self._first(number)
        elif now - self._requested_at > SAME_REQUEST_S and number != WARNING_SIGNAL:
            self._again(number)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Delay stop signals to the end of the block; processes started inside inherit the delay."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

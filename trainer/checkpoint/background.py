"""One task at a time in a thread beside the steps of a run, whose failure the run learns when it asks."""

import threading
from collections.abc import Callable

LAST_MOMENT_S = 2.0


class Background:
    """Runs tasks one after another; what a task raises is raised by `finish`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the task has raised already."""
        return self._error is not None

    def start(self, task: Callable[[], None]) -> None:
        """Begin a task; the one before has to be finished."""

        def run() -> None:
            try:
                task()
            except BaseException as error:
                self._error = error

        assert self._thread is None
        # A daemon: the process may end though others, which this thread waits for, have died.
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the task, if there is one, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Wait a moment for the task, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join(LAST_MOMENT_S)

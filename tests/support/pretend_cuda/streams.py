"""Streams and events of a pretend device: what one does is ordered after another's work only where an event says so.

All work is done at once, in the order of the calls, so that a missing order would show in no result: it raises here.
"""

import threading
from typing import Any, ClassVar

import torch

CUDA = torch.device("cuda", 0)


class Stream:
    """clock: how much work each stream had been given that this one is ordered after, itself included."""

    default: ClassVar["Stream"]
    _of_thread = threading.local()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.device_index, self.device_type, self.stream_id = CUDA, 0, 1, 0
        self.clock: dict[Stream, int] = {self: 0}

    @classmethod
    def current(cls, *_: Any) -> "Stream":
        """Return the stream of this thread, which begins with the default one."""
        return getattr(cls._of_thread, "stream", cls.default)

    @classmethod
    def set_current(cls, stream: "Stream") -> None:
        cls._of_thread.stream = stream

    def work(self) -> "Work":
        """Give the stream a piece of work."""
        self.clock[self] += 1
        return Work(self, self.clock[self])

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or Stream.current()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.current()).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed_time(self, _: "Event") -> float:
        return 0.0


class Work:
    """What made a tensor; users: the streams that its memory is kept for."""

    def __init__(self, stream: Stream, time: int) -> None:
        self.stream, self.time, self.users = stream, time, {stream}

    def check(self) -> None:
        """Raise where the current stream uses the tensor too early, or memory that others may be given meanwhile."""
        stream = Stream.current()
        if stream.clock.get(self.stream, 0) < self.time:
            raise RuntimeError("a stream uses what another makes, and has not waited for it")
        if stream not in self.users:
            raise RuntimeError("a stream uses memory of another that is not kept for it: no record_stream")


Stream.default = Stream()

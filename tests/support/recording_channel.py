"""A channel without peers that records the order of its transfers."""

from collections.abc import Sequence

from torch import Tensor


class RecordingChannel:
    """A shift returns what was sent, an exchange zeros (with one rank what was sent), an all-reduce its input."""

    inner_size = 1

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.events: list[str] = []
        self.gradients = self

    def shift(
        self, buffer: Tensor, *, kind: str, tag: int, to: int | None = None, source: int | None = None
    ) -> "RecordedTransfer":
        neighbors = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        assert (to, source) in ((None, None), neighbors)
        return RecordedTransfer(self, buffer, kind)

    def start_all_to_all(
        self, buffer: Tensor, *, sent: Sequence[int], received: Sequence[int], kind: str
    ) -> "RecordedTransfer":
        return RecordedTransfer(self, self._exchanged(buffer, sum(received)), kind)

    def all_to_all(self, buffer: Tensor, *, kind: str) -> Tensor:
        return self._exchanged(buffer, len(buffer))

    def all_reduce(self, x: Tensor, *, kind: str) -> Tensor:
        return x

    def _exchanged(self, buffer: Tensor, rows: int) -> Tensor:
        return buffer if self.size == 1 else buffer.new_zeros(rows, *buffer.shape[1:])


class RecordedTransfer:
    def __init__(self, channel: RecordingChannel, buffer: Tensor, kind: str) -> None:
        self.channel, self.buffer, self.kind = channel, buffer, kind
        channel.events.append(f"send {kind}")

    def wait(self) -> Tensor:
        self.channel.events.append(f"wait {self.kind}")
        return self.buffer

"""Tells the passes of attention from all else in a step."""

from collections.abc import Iterable
from typing import Any

from farspan.kernels.planner import SequenceAttention
from tests.support.pretend_cuda.counts import Part
from tests.support.pretend_cuda.tensor import PretendDevice


def watch(planned: Iterable[SequenceAttention], device: PretendDevice) -> None:
    """Count what the forward and backward passes of these plans do under their parts."""
    for attention in {id(one): one for one in planned}.values():
        kind: Any = type(attention)

        def forward(self: Any, *inputs: Any, kind: Any = kind) -> Any:
            with device.counts.in_part(Part.FORWARD):
                return kind.forward(self, *inputs)

        def backward(self: Any, *inputs: Any, kind: Any = kind) -> Any:
            with device.counts.in_part(Part.BACKWARD):
                return kind.backward(self, *inputs)

        # Plans are frozen, and may have slots: a class of the same layout takes the place of theirs.
        watched = type(kind.__name__, (kind,), {"__slots__": (), "forward": forward, "backward": backward})
        object.__setattr__(attention, "__class__", watched)

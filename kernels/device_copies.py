"""Tensors that the host plans ahead, such as index maps, and their copies on devices, for which it never waits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from farspan.kernels.caching import once


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    """Return x on `device`, copied from the CPU if it lies there; the host goes on before the copy is made."""
    if x.device == device or device.type != "cuda":
        return x.to(device)
    # A copy from pageable memory waits for what was launched before. Nothing cannot be pinned.
    copy = x.pin_memory().to(device, non_blocking=True) if x.numel() else torch.empty_like(x, device=device)
    # A thread that plans ahead copies on a stream of its own, whose next copies must not get this memory before what
    # computes, on the default stream, is done with it.
    copy.record_stream(torch.cuda.default_stream(device))
    return copy


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCopies:
    """A tensor, mostly on the CPU, that each device gets a copy of, once."""

    host: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on `device`."""
        return once(self._copies, device, lambda: copy_to(self.host, device))

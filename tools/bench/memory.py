"""Peak memory of one forward and backward pass, above the memory in use before."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from farspan.tools.bench.case import Attention

Peaks = dict[str, int]
"""Bytes by direction. Each is above the inputs; backward above what forward left, too."""
WARM_UP_TOKENS = 64


def reports_memory(device: torch.device) -> bool:
    """Whether this system reports peaks."""
    return device.type == "cuda" or Path("/proc/self/status").exists()


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (highest since start or reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this measurement needs Linux")


def peaks_of_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> Peaks:
    """Return the peaks of one pass in this process; on a CPU memory freed before it hides what it needs."""
    meter = _CudaMeter() if dout.is_cuda else Meter()
    before = meter.reset()
    out = attention(*inputs)
    forward = meter.peak() - before
    between = meter.reset()
    gradients = torch.autograd.grad(out, inputs, dout)
    backward = meter.peak() - between
    del gradients
    return {"fwd": forward, "bwd": backward, "fwd_bwd": max(forward, backward + between - before)}


class Meter:
    """Counts this process's resident pages, on Linux."""

    def reset(self) -> int:
        """Return the bytes in use; peaks count from now on."""
        with contextlib.suppress(OSError):  # where a sandbox forbids it, peaks count from the start of the process
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        return resident_bytes("VmRSS")

    def peak(self) -> int:
        return resident_bytes("VmHWM")


class _CudaMeter:
    def reset(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

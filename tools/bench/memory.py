"""Peak memory of one forward and backward pass, above the memory in use before."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import outcome
from farspan.tools.bench.contenders import Contender

Peaks = dict[str, int]
"""Bytes by direction. Each is above the inputs; backward above what forward left, too."""
WARM_UP_TOKENS = 64
STATUS = Path("/proc/self/status")


def peaks_of_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> Peaks | None:
    """Run one pass in this process; return its peaks, or None where the system does not report memory.

    CUDA: by torch's allocator. CPU: by the system's count of resident pages (Linux only), where memory freed before
    hides what the pass needs.
    """
    if not dout.is_cuda and not STATUS.exists():
        outcome(attention, inputs, dout)
        return None
    before = reset_peak(dout.device)
    out = attention(*inputs)
    forward = peak(dout.device) - before
    between = reset_peak(dout.device)
    gradients = torch.autograd.grad(out, inputs, dout)
    backward = peak(dout.device) - between
    del gradients
    return {"fwd": forward, "bwd": backward, "fwd_bwd": max(forward, backward + between - before)}


def peaks_of_case(contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks | None:
    attention = contender.plan(case.mechanism, case.rows(tokens), shape)
    return peaks_of_pass(attention, inputs_of(case.mechanism, tokens, shape), gradient_of_out(tokens, shape))


def peaks_in_fresh_process(worker: object, contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks | None:
    peaks_of_case(contender, case, WARM_UP_TOKENS, shape)  # loads libraries and their workspaces
    return peaks_of_case(contender, case, tokens, shape)


def reset_peak(device: torch.device) -> int:
    """Return the bytes in use; peaks count from now on."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # where a sandbox forbids it, peaks count from the start of the process
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    return _resident_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident_bytes("VmHWM")


def _resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (highest since start or reset) of this process."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))

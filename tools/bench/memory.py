"""Peak memory of one forward and backward pass, above what was held before."""

import contextlib
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.case import Attention, Case, Contender, Shape, gradient_of_out, inputs_of
from farspan.tools.measure_loss_memory import resident_bytes

Peaks = dict[str, int]
"""Bytes by direction. Each is above the inputs; backward above what forward left, too."""
WARM_UP_TOKENS = 64
PRELOAD = ["farspan.tools.bench.memory", "farspan.tools.bench.contenders"]
"""Imported once, in the process that those of all cases are forked from."""


def peaks_of(contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks | None:
    """Return the peaks of a case; None where this system does not tell.

    CUDA: by torch's allocator. CPU: by the kernel's count of resident pages, in a process of its own (Linux only).
    """
    if shape.device.type == "cuda":
        return _measure(contender, case, tokens, shape)
    if not tells_memory(shape.device):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, contender, case, tokens, shape, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.join()
        ours.close()


def tells_memory(device: torch.device) -> bool:
    """Whether peaks can be told on this system."""
    return device.type == "cuda" or Path("/proc/self/status").exists()


def _serve(answer: Connection, contender: Contender, case: Case, tokens: int, shape: Shape, threads: int) -> None:
    torch.set_num_threads(threads)
    with connected(Ranks(), shape.device):
        _measure(contender, case, WARM_UP_TOKENS, shape)  # loads libraries and their workspaces
        answer.send(_measure(contender, case, tokens, shape))


def _measure(contender: Contender, case: Case, tokens: int, shape: Shape) -> Peaks:
    attention = contender.plan(case.mechanism, case.rows(tokens), shape)
    return peaks_of_pass(attention, inputs_of(case.mechanism, tokens, shape), gradient_of_out(tokens, shape))


def peaks_of_pass(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> Peaks:
    """Return the peaks of one pass in this process; on a CPU what was freed before it hides what it needs."""
    meter = _CudaMeter() if dout.is_cuda else _Meter()
    before = meter.held()
    out = attention(*inputs)
    forward = meter.peak() - before
    between = meter.held()
    gradients = torch.autograd.grad(out, inputs, dout)
    backward = meter.peak() - between
    del gradients
    return {"fwd": forward, "bwd": backward, "fwd_bwd": max(forward, backward + between - before)}


class _Meter:
    def held(self) -> int:
        """Return the bytes held now; peaks count from here."""
        with contextlib.suppress(OSError):  # where a sandbox forbids it, peaks count from the start of the process
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        return resident_bytes("VmRSS")

    def peak(self) -> int:
        return resident_bytes("VmHWM")


class _CudaMeter:
    def held(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

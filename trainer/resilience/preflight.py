"""A look at every rank's node before a run starts: what cannot work ends it at once, what is odd is said in a line."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from uuid import uuid4

import torch
import torch.distributed as dist

from farspan.errors import ConfigError, FarspanError
from farspan.trainer.resilience.agreement import all_gather_objects
from farspan.trainer.resilience.signals import UNFIT_FILE

CLOCK_S, SLOWER, LESS_MEMORY = 2.0, 1.5, 0.8
"""What is odd: a clock that far off the median, a product that many times slower, that part of the median's memory."""
PRODUCT_WIDTH = {"cpu": 256, "cuda": 4096}
PRODUCTS = 10
PROBE_BYTES = 4096
SUMMED = 1024


class BadNodeError(FarspanError):
    """A node cannot take part in the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one rank found on its node: seconds of its clock and of a product, free bytes, and what does not work.

    no_device: why it has not the device that the run asks for.
    """

    host: str
    clock: float
    memory: int
    product_s: float
    disk: int
    no_device: str | None
    fault: str | None


def run_preflight(folder: Path, choose_device: Callable[[], torch.device]) -> list[str]:
    """Check every rank's device, memory, clock, connection and access to the run's folder; return what is to be said.

    choose_device: returns this rank's device; raises ConfigError where there is none. All ranks have to call. Raises
    BadNodeError on all where some node cannot take part, and leaves a line for each such host in the folder's file
    `unfit`. That no rank has its device is not for this to say.
    """
    # All at one time, so that clocks can be compared.
    dist.all_reduce(torch.zeros(1))
    clock = time.time()
    try:
        device, no_device = choose_device(), None
    except ConfigError as error:
        device, no_device = torch.device("cpu"), str(error)
    everywhere = all_gather_objects(_look(folder, device, clock, no_device))
    if all(found.no_device for found in everywhere):
        return []
    _refuse(folder, {found.host: found.no_device or found.fault for found in everywhere})
    sums = all_gather_objects((socket.gethostname(), _fault_of_sum(device)))
    _refuse(folder, dict(sorted(sums, key=lambda each: each[1] is not None)))
    return list(report(everywhere))


def report(everywhere: list[Found]) -> Iterable[str]:
    """Yield a line for all nodes and one for each rank with something odd."""
    product = median(found.product_s for found in everywhere)
    memory = median(found.memory for found in everywhere)
    clock = median(found.clock for found in everywhere)
    yield (
        f"nodes       {len({found.host for found in everywhere})} with {len(everywhere)} ranks; each has "
        f"{memory / 2**30:.1f} GiB of memory free, a product takes {product * 1e3:.2f} ms (medians); "
        f"{min(found.disk for found in everywhere) / 2**30:,.0f} GiB of disk free"
    )
    for rank, found in enumerate(everywhere):
        odd = []
        if abs(found.clock - clock) > CLOCK_S:
            odd.append(f"its clock is {found.clock - clock:+.1f} s off")
        if found.product_s > SLOWER * product:
            odd.append(f"a product takes {found.product_s * 1e3:.2f} ms")
        if found.memory < LESS_MEMORY * memory:
            odd.append(f"only {found.memory / 2**30:.1f} GiB of memory is free")
        if odd:
            yield f"odd node    {found.host}, rank {rank}: {', '.join(odd)}"


def _look(folder: Path, device: torch.device, clock: float, no_device: str | None) -> Found:
    memory, product_s, fault = 0, 0.0, _fault_of_folder(folder)
    try:
        memory, product_s = _free_memory(device), _product_seconds(device)
    except RuntimeError as error:
        fault = f"{device} cannot compute ({str(error).splitlines()[0]})"
    return Found(
        host=socket.gethostname(),
        clock=clock,
        memory=memory,
        product_s=product_s,
        disk=shutil.disk_usage(_nearest(folder)).free,
        no_device=no_device,
        fault=fault,
    )


def _refuse(folder: Path, faults: Mapping[str, str | None]) -> None:
    """Raise BadNodeError, with a note in the folder, if some host has a fault; it is the same on all ranks."""
    unfit = {host: fault for host, fault in faults.items() if fault is not None}
    if not unfit:
        return
    # One host after another: that of rank 0 may be the one that cannot write.
    if socket.gethostname() not in unfit:
        with suppress(OSError):
            (folder / UNFIT_FILE).write_text("".join(f"{host} {fault}\n" for host, fault in unfit.items()))
    raise BadNodeError(f"{'; '.join(f'{host}: {fault}' for host, fault in unfit.items())}: start on other nodes.")


def _nearest(folder: Path) -> Path:
    """Return the folder or, while it does not exist, the nearest one above: refused runs shall leave none behind."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _fault_of_sum(device: torch.device) -> str | None:
    ranks = dist.get_world_size()
    summed = torch.full((SUMMED,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(summed)
    expected = ranks * (ranks + 1) / 2
    wrong = summed[summed != expected].tolist()
    return f"a sum over all ranks is {wrong[0]:g}, not {expected:g}" if wrong else None


def _fault_of_folder(folder: Path) -> str | None:
    # Other runs may look at the same folder now.
    path, written = _nearest(folder) / f".probe_{uuid4().hex}", os.urandom(PROBE_BYTES)
    try:
        try:
            path.write_bytes(written)
            read = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"run.folder={str(folder)!r} cannot be written ({error.strerror or error})"
    return None if read == written else f"run.folder={str(folder)!r} gives back other bytes than were written"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: +(\d+) kB", table.read_text()) if table.exists() else None
    return int(available[1]) * 1024 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _product_seconds(device: torch.device) -> float:
    """Return how long a product of two matrices takes at best, after one to get ready."""
    width = PRODUCT_WIDTH[device.type]
    a = torch.ones(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = []
    for _ in range(1 + PRODUCTS):
        start = time.perf_counter()
        # To read a number waits for the device.
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])

"""A check of every rank's node before a run starts: bad nodes end it at once, odd ones are logged."""

import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from uuid import uuid4

import torch
import torch.distributed as dist

from farspan.errors import USER_ERRNOS, ConfigError, FarspanError
from farspan.trainer.resilience.agreement import all_gather_objects
from farspan.trainer.resilience.lock import HOW_TO_WRITE
from farspan.trainer.resilience.signals import UNFIT_FILE
from farspan.units import BYTES, readable

CLOCK_S, SLOWER, LESS_MEMORY = 2.0, 1.5, 0.8
"""A node is odd if its clock is this far off the median, a matrix product takes this many times the median, or less
than this part of the median memory is free."""
PRODUCT_WIDTH = {"cpu": 256, "cuda": 4096}
PRODUCTS = 10
PROBE_BYTES = 4096
SUMMED = 1024


class BadNodeError(FarspanError):
    """A node cannot take part in the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCheck:
    """What one rank measured on its node."""

    host: str
    clock: float
    """Seconds since the epoch, taken by all ranks at one moment."""
    memory: int
    """Free bytes of the device."""
    product_s: float
    disk: int
    """Free bytes."""
    no_device: str | None
    """Why the rank lacks the device that the run asks for."""
    unwritable: str | None
    """How the run's folder cannot be written, if the user can change that."""
    fault: str | None
    """What does not work."""


def run_preflight(folder: Path, choose_device: Callable[[], torch.device]) -> list[str]:
    """Check every rank's device, memory, clock, connection and access to the run's folder; return lines to log.

    choose_device: returns this rank's device; raises ConfigError where there is none. All ranks have to call. Raises
    BadNodeError on all where some node cannot take part, and leaves a line for each such host in the folder's file
    `unfit`. What no rank can do is no fault of nodes: where none has its device, the caller refuses the run; where none
    can write the folder, all raise ConfigError.
    """
    # All at one time, so that clocks can be compared.
    dist.all_reduce(torch.zeros(1))
    clock = time.time()
    try:
        device, no_device = choose_device(), None
    except ConfigError as error:
        device, no_device = torch.device("cpu"), str(error)
    checks = all_gather_objects(_check(folder, device, clock, no_device))
    if all(check.no_device for check in checks):
        return []
    if all(check.unwritable for check in checks):
        raise ConfigError(f"{checks[0].unwritable}: {HOW_TO_WRITE}.")
    _raise_if_bad(folder, [(check.host, check.no_device or check.fault or check.unwritable) for check in checks])
    _raise_if_bad(folder, all_gather_objects((socket.gethostname(), _fault_of_sum(device))))
    return list(report(checks))


def report(checks: list[NodeCheck]) -> Iterable[str]:
    """Yield a line for all nodes and one for each rank with something odd."""
    product = median(check.product_s for check in checks)
    memory = median(check.memory for check in checks)
    clock = median(check.clock for check in checks)
    yield (
        f"nodes       {len({check.host for check in checks})} with {len(checks)} ranks; each has "
        f"{readable(memory, BYTES)} of memory free, a product takes {product * 1e3:.2f} ms (medians); "
        f"{readable(min(check.disk for check in checks), BYTES)} of disk free"
    )
    for rank, check in enumerate(checks):
        odd = []
        if abs(check.clock - clock) > CLOCK_S:
            odd.append(f"its clock is {check.clock - clock:+.1f} s off")
        if check.product_s > SLOWER * product:
            odd.append(f"a product takes {check.product_s * 1e3:.2f} ms")
        if check.memory < LESS_MEMORY * memory:
            odd.append(f"only {readable(check.memory, BYTES)} of memory is free")
        if odd:
            yield f"check node  {check.host}, rank {rank}: {', '.join(odd)}"


def _check(folder: Path, device: torch.device, clock: float, no_device: str | None) -> NodeCheck:
    memory, product_s, disk, unwritable, fault = 0, 0.0, 0, None, None
    try:
        memory, product_s = _free_memory(device), _product_seconds(device)
    except RuntimeError as error:
        fault = f"{device} cannot compute ({str(error).splitlines()[0]})"
    # Where there are checkpoints, possibly behind a link; otherwise where they will be.
    place = folder / "checkpoints"
    try:
        place = _nearest_existing(place)
        disk = shutil.disk_usage(place).free
        fault = _fault_of_storage(place) or fault
    except OSError as error:
        reason = f"run.folder={str(folder)!r} cannot be written at {place} ({error.strerror or error})"
        # No file at all can be made in some folders of the system, such as /proc.
        if error.errno in USER_ERRNOS | {errno.ENOENT}:
            unwritable = reason
        else:
            fault = reason
    return NodeCheck(
        host=socket.gethostname(),
        clock=clock,
        memory=memory,
        product_s=product_s,
        disk=disk,
        no_device=no_device,
        unwritable=unwritable,
        fault=fault,
    )


def _raise_if_bad(folder: Path, faults: Iterable[tuple[str, str | None]]) -> None:
    """Raise BadNodeError, with a note in the folder, if some rank has a fault.

    faults: of each rank, with its host; equal on all ranks.
    """
    # One rank is enough: others of its host, with other devices, may be well.
    bad = {host: fault for host, fault in faults if fault is not None}
    if not bad:
        return
    # Each host with working storage writes the same note: that of rank 0 may be unable to.
    if socket.gethostname() not in bad:
        with suppress(OSError):
            (folder / UNFIT_FILE).write_text("".join(f"{host} {fault}\n" for host, fault in bad.items()))
    raise BadNodeError(f"{'; '.join(f'{host}: {fault}' for host, fault in bad.items())}: start on other nodes.")


def _nearest_existing(folder: Path) -> Path:
    """Return the folder or, while it does not exist, the nearest one above: a refused run leaves no folder behind.

    Raises OSError if that is no folder.
    """
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is no folder")
    return nearest


def _fault_of_sum(device: torch.device) -> str | None:
    ranks = dist.get_world_size()
    summed = torch.full((SUMMED,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(summed)
    expected = ranks * (ranks + 1) / 2
    wrong = summed[summed != expected].tolist()
    return f"a sum over all ranks is {wrong[0]:g}, not {expected:g}" if wrong else None


def _fault_of_storage(folder: Path) -> str | None:
    """Write and read a file in the folder; raises OSError."""
    # A name of its own, since other runs may check the same folder now.
    path, written = folder / f".probe_{uuid4().hex}", os.urandom(PROBE_BYTES)
    try:
        path.write_bytes(written)
        read = path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
    return None if read == written else f"{folder} gives back other bytes than were written"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: +(\d+) kB", table.read_text()) if table.exists() else None
    return int(available[1]) * 1024 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _product_seconds(device: torch.device) -> float:
    """Return the best time of a product of two matrices, after one to warm up."""
    width = PRODUCT_WIDTH[device.type]
    a = torch.ones(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = []
    for _ in range(1 + PRODUCTS):
        start = time.perf_counter()
        # Reading a number waits for the device.
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])

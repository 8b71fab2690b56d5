"""The environment variables that farspan reads and those that it sets for ranks; no other file touches them.

Importing torch takes seconds, so no file of this folder imports it at its top.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.errors import ConfigError
from farspan.paths import expanded_setting

if TYPE_CHECKING:
    from farspan.parallel.ranks import Ranks

LAUNCHER = "FARSPAN_LAUNCHER"
FIX = "start ranks with torchrun or 'farspan launch', or unset RANK for a single process"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
TASK_COUNTS = (
    "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
    "FLUX_JOB_SIZE",
)  # fmt: skip
"""How many processes srun, Open MPI, MPICH with its relatives, MVAPICH, jsrun or flux has started. SLURM_NTASKS is no
such number: a batch script, which is one process, has that of its allocation."""

NCCL_RECORD = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where NCCL's flight recorder, its last operations of each rank, goes when one fails or times out: all but the rank's
number at the end of the file's name."""
DEVICE_DEFAULTS = (
    # Sizes of buffers change with every batch; without, the memory between them is lost to fragmentation.
    (("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"),
    (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
    (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
)
"""Variables of torch, each with its earlier name, and what ranks set them to, unless the user has set one."""


def set_device_defaults() -> None:
    """Set torch's variables for GPUs and NCCL; torch reads them when it is imported or later."""
    for names, value in DEVICE_DEFAULTS:
        _set_default(names, value)


def record_nccl_in(folder: Path) -> None:
    """Let NCCL's flight recorder write nccl_rank_RANK into the run's folder; torch reads it when ranks connect."""
    _set_default(NCCL_RECORD, str(folder / "nccl_rank_"))


def set_deepspeed_defaults(ranks: Ranks, device: str) -> None:
    """Set what DeepSpeed reads when it is imported: the rank of this process on its machine, and its kind of device.

    device: train.device. By itself DeepSpeed searches for devices, and takes a GPU where the run is on CPUs.
    """
    _set_default(["LOCAL_RANK"], str(ranks.local_rank))
    if device == "cpu":
        _set_default(["DS_ACCELERATOR"], "cpu")


def _set_default(names: Sequence[str], value: str) -> None:
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = value


def read_ranks() -> Ranks:
    """Return this process's rank among others, as torchrun sets it; without torchrun it is the only one."""
    from farspan.parallel.ranks import Ranks

    if "RANK" not in os.environ:
        check_single_task()
        return Ranks(job=job_id())
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        try:
            numbers[name] = int(os.environ[name])
        except KeyError:
            raise ConfigError(f"RANK is set but {name} is not: {FIX}.") from None
        except ValueError:
            raise ConfigError(f"{name}={os.environ[name]!r} in the environment must be an integer: {FIX}.") from None
    rank, world_size, local_rank = numbers.values()
    if not 0 <= rank < world_size or local_rank < 0:
        raise ConfigError(
            f"RANK={rank}, LOCAL_RANK={local_rank} do not fit WORLD_SIZE={world_size} in the environment: {FIX}."
        )
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ConfigError(f"RANK is set but {name} is not, so ranks cannot meet: {FIX}.")
        port = os.environ["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"MASTER_PORT={port!r} in the environment must be a port, 1 to {2**16 - 1}: {FIX}.")
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, job=job_id())


def check_single_task() -> None:
    """Raise ConfigError if this process is one of several that a cluster's launcher has started without ranks."""
    for name in TASK_COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name}={count}: {count} processes were started but RANK is not set, so each would be a run of its "
                "own: use 'farspan launch slurm', or start torchrun once on each node; for runs of their own, each in "
                "its run.folder, set RANK=0 WORLD_SIZE=1 LOCAL_RANK=0."
            )


def choose_gloo_interface(ranks: Ranks) -> str | None:
    """Set the network interface of gloo, which by itself resolves the name of this machine; return it if changed.

    Where all ranks are on this machine, that is loopback; otherwise, if the name does not lead to an address that other
    machines can reach, the interface towards MASTER_ADDR.
    """
    if GLOO_INTERFACE in os.environ:
        return None
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == str(ranks.world_size):
        interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    else:
        interface = None if _is_reachable_by_name() else _interface_towards(os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ[GLOO_INTERFACE] = interface
    return interface


def _is_reachable_by_name() -> bool:
    """Return whether this machine's name resolves to an address that it has and that is not loopback."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
                    return True
    return False


def _interface_towards(host: str) -> str | None:
    """Return the interface of Linux's most specific IPv4 route to a host; None if there is no route or no such host."""
    with suppress(OSError):
        target = int.from_bytes(socket.inet_aton(socket.gethostbyname(host)), sys.byteorder)
        routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
        # Interface, destination, ..., mask: hexadecimal, in the byte order of the machine.
        masks = [(int(route[7], 16), route[0]) for route in routes if target & int(route[7], 16) == int(route[1], 16)]
        return max(masks, key=lambda found: found[0].bit_count())[1] if masks else None
    return None


def report_to_torchrun(message: str) -> None:
    """Give torchrun the error of this rank, for the end of its own report."""
    file = os.environ.get(ERROR_FILE)
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the SLURM job that a process is part of, for an array's element such as 17_3."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def restart_count() -> int:
    """Return how often the SLURM job that this process is part of was queued again."""
    # SLURM leaves the variable out at the first start.
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def visible_gpus() -> str | None:
    return os.environ.get(VISIBLE_GPUS)


def set_visible_gpus(gpus: str | None) -> None:
    """Let this process and its children see these GPUs, None for all."""
    os.environ.pop(VISIBLE_GPUS, None)
    if gpus is not None:
        os.environ[VISIBLE_GPUS] = gpus


def environment_with_threads(num_threads: int) -> Mapping[str, str]:
    """Return the environment for torchrun and its ranks; OMP_NUM_THREADS stays as the user set it."""
    return {"OMP_NUM_THREADS": str(num_threads), **os.environ, LAUNCHER: str(os.getpid())}


def take_launcher() -> int | None:
    """Return the process of `farspan launch local` that started this one, dead or alive, and name this one to children.

    None if another program started it.
    """
    number = os.environ.get(LAUNCHER)
    if number is None:
        return None
    os.environ[LAUNCHER] = str(os.getpid())
    return int(number)


def is_rank() -> bool:
    """Return whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ


def site_file() -> Path | None:
    """Return the file of the cluster's settings that FARSPAN_SITE names."""
    named = os.environ.get("FARSPAN_SITE")
    return Path(expanded_setting("FARSPAN_SITE", named)) if named else None


def environment_outside_jobs() -> Mapping[str, str]:
    """Return the environment for sbatch, which inside a job would apply the settings of that job to the new one."""
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}


@contextmanager
def outside_jobs() -> Iterator[None]:
    """Have `environment_outside_jobs` inside the block."""
    of_job = {name: os.environ.pop(name) for name in os.environ.keys() - environment_outside_jobs().keys()}
    try:
        yield
    finally:
        os.environ.update(of_job)

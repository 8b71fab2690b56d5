"""The environment variables that farspan reads and those that it sets for ranks; no other file touches them.

Importing torch takes seconds, so no file of this folder imports it at its top.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.errors import ConfigError
from farspan.paths import expanded_setting

if TYPE_CHECKING:
    from farspan.parallel.ranks import Ranks

LAUNCHER = "FARSPAN_LAUNCHER"
FIX = "start ranks with torchrun or 'farspan launch', or unset RANK for a single process"


def read_ranks() -> Ranks:
    """Return this process's rank among others, as torchrun sets it; without torchrun it is the only one."""
    from farspan.parallel.ranks import Ranks

    if "RANK" not in os.environ:
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
    return Ranks(rank=rank, world_size=world_size, local_rank=local_rank, job=job_id())


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the SLURM job that a process is part of, for an array's element such as 17_3."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


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

"""SLURM's commands."""

import subprocess
from collections.abc import Sequence

from farspan.errors import FarspanError
from farspan.launch.env import outside_of_jobs


class SlurmError(FarspanError):
    """SLURM is not there, or has refused."""


def slurm(command: Sequence[str]) -> str:
    """Run one of SLURM's commands and return what it prints; raises SlurmError with its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=outside_of_jobs(), stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} was not found: use a machine of the cluster.") from None
    if done.returncode:
        raise SlurmError(f"{command[0]} refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout

"""SLURM's commands."""

import subprocess
from collections.abc import Sequence

from farspan.errors import FarspanError
from farspan.launch.env import environment_outside_jobs


class SlurmError(FarspanError):
    """SLURM is not available, or refused a command."""


def run_slurm(command: Sequence[str]) -> str:
    """Run one of SLURM's commands and return its output; raises SlurmError with its complaint."""
    environment = environment_outside_jobs()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} was not found: use a machine of the cluster.") from None
    if done.returncode:
        raise SlurmError(f"{command[0]} refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout

"""What a cluster demands of every job, in one TOML file of its own: account, modules, network, containers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farspan.errors import ConfigError
from farspan.launch.slurm.failures import Exclusion
from farspan.trainer.toml_config import bounded, load_config

# `farspan launch slurm` sets these, and what they say has to hold.
OURS = {
    "nodes", "ntasks-per-node", "ntasks", "cpus-per-task", "time", "partition", "constraint", "job-name", "dependency",
    "output", "error", "open-mode", "signal", "requeue", "no-requeue", "chdir", "array",
}  # fmt: skip
SIGNAL_EARLY_S = 60
"""SLURM may send its warning that much earlier than asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How `--container IMAGE` starts a command in IMAGE; `{image}` stands for it.

    srun: options of srun, for clusters whose SLURM starts containers. command: goes before the command, for others.
    python: the interpreter in the image. The run's folder and the data must be there under the same paths.
    """

    srun: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    python: str = "python3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One cluster's settings.

    sbatch: options of sbatch by their long names, such as account; true for one that takes no value. gpus: the option
    that asks for a node's GPUs, `{count}` of them. cpus_per_rank: cores, and threads, of each rank. environment:
    variables of all ranks. setup: lines of bash before they start, such as `module load cuda`. warning_s: how long
    before the end of its time a job is warned, to save. requeues: how often one job may start again. max_failures: so
    many failures in a row, with no newer checkpoint between them, end it. exclude_hours: how long nodes on which the
    run failed are left out. max_excluded: how many of them at most.
    """

    sbatch: dict[str, Any] = field(default_factory=dict)
    gpus: str = "gpus-per-node={count}"
    cpus_per_rank: int = bounded(1, minimum=1)
    environment: dict[str, Any] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    warning_s: int = bounded(300, minimum=1)
    requeues: int = bounded(20, minimum=0)
    max_failures: int = bounded(3, minimum=1)
    exclude_hours: float = bounded(24.0, minimum=0)
    max_excluded: int = bounded(8, minimum=0)
    container: Container = field(default_factory=Container)

    @property
    def exclusion(self) -> Exclusion:
        return Exclusion(hours=self.exclude_hours, most=self.max_excluded, always=str(self.sbatch.get("exclude", "")))


def load_site(path: Path | None) -> Site:
    """Read a site's file; without one nothing is special. Raises ConfigError for what cannot be."""
    if path is None:
        return Site()
    site = load_config(Site, path)
    for table, values in (("sbatch", site.sbatch), ("environment", site.environment)):
        for name, value in values.items():
            if value is False or not isinstance(value, str | int | float) or "\n" in str(value):
                raise ConfigError(f"{table}.{name} in {path} must be one line of text, a number or true.")
    for name in site.sbatch:
        if name in OURS:
            raise ConfigError(f"sbatch.{name} in {path} is set by farspan launch slurm: take it out there.")
    for name, value in site.environment.items():
        if isinstance(value, bool) or not name.isidentifier() or not name.isascii():
            raise ConfigError(f"environment.{name} in {path} must be a variable's name with a text or a number.")
    return site

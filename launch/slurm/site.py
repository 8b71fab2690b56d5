"""The settings of one cluster, from a TOML file of its own: account, modules, network, containers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from farspan.errors import ConfigError
from farspan.launch.slurm.history import ExclusionPolicy
from farspan.paths import expanded_setting
from farspan.trainer.toml_config import bounded, load_config

# Options of sbatch that `farspan launch slurm` sets itself.
RESERVED_OPTIONS = {
    "nodes", "ntasks-per-node", "ntasks", "cpus-per-task", "time", "partition", "constraint", "job-name", "dependency",
    "output", "error", "open-mode", "signal", "requeue", "no-requeue", "chdir", "array",
}  # fmt: skip
SIGNAL_EARLY_S = 60
"""SLURM may send its warning that much too early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How `--container IMAGE` starts a command in IMAGE; `{image}` stands for it.

    srun: options of srun, for clusters whose SLURM starts containers. command: a prefix of the command, for others.
    python: the interpreter in the image. The image must have the run's folder and the data under the same paths.
    """

    srun: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    python: str = "python3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One cluster's settings.

    sbatch: options of sbatch by their long names, such as account; true for one without a value. gpus: the option that
    requests a node's GPUs, `{count}` of them. cpus_per_rank: cores, and threads, of each rank. environment: variables
    for all ranks. setup: lines of bash that run before the ranks, such as `module load cuda`. warning_s: how long
    before its time limit a job gets SIGUSR1, to save. requeues: how often a job may be queued again. max_failures: a
    job ends after that many failures in a row without a newer checkpoint. exclude_hours: how long nodes on which the
    run failed are excluded. max_excluded: how many of them at most.
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
    def exclusion(self) -> ExclusionPolicy:
        always = str(self.sbatch.get("exclude", ""))
        return ExclusionPolicy(hours=self.exclude_hours, max_nodes=self.max_excluded, always=always)


def _expanded(site: Site, path: Path) -> Site:
    """Replace `~` and `$NAME` in texts that the job gets as they are. Lines of `setup` are left to the shell there."""

    def expand(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(expand(name, word) for word in value)
        return expanded_setting(f"{name} in {path}", value) if isinstance(value, str) else value

    def table(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: expand(f"{name}.{key}", value) for key, value in values.items()}

    return replace(
        site,
        sbatch=table("sbatch", site.sbatch),
        environment=table("environment", site.environment),
        container=Container(**table("container", asdict(site.container))),
    )


def load_site(path: Path | None) -> Site:
    """Read a site's file, or return the defaults without one; raises ConfigError for invalid values."""
    if path is None:
        return Site()
    site = _expanded(load_config(Site, path), path)
    for table, values in (("sbatch", site.sbatch), ("environment", site.environment)):
        for name, value in values.items():
            if value is False or not isinstance(value, str | int | float) or "\n" in str(value):
                raise ConfigError(f"{table}.{name} in {path} must be one line of text, a number or true.")
    for name in site.sbatch:
        if name in RESERVED_OPTIONS:
            raise ConfigError(f"sbatch.{name} in {path} is set by farspan launch slurm: remove it.")
    for name, value in site.environment.items():
        if isinstance(value, bool) or not name.isidentifier() or not name.isascii():
            raise ConfigError(f"environment.{name} in {path} must be the name of a variable, with a text or a number.")
    return site

"""What a job runs: the configurations of its runs, one or an array's, and the job itself, checked beforehand."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from farspan.launch.env import site_file
from farspan.launch.slurm.job import SlurmJob, element_name
from farspan.launch.slurm.site import load_site
from farspan.launch.slurm.submit import check_ready, next_submission
from farspan.trainer.config import Config
from farspan.trainer.resolve import dry_run_plan, open_data
from farspan.trainer.toml_config import load_config

log = logging.getLogger("farspan")


def load_runs(
    source: Path | Mapping[str, Any] | Config, overrides: Sequence[str], changes: Sequence[Sequence[str]]
) -> tuple[Path, list[Config]]:
    """Return run.folder and the configurations of the runs: one, or one for each of `changes`, in numbered folders.

    overrides, changes: as `section.key=value`.
    """
    folder = load_config(Config, source, overrides).run.folder
    configs = [load_config(Config, source, [*overrides, *change]) for change in changes or [()]]
    for number, change in enumerate(changes):
        name = element_name(number)
        configs[number] = replace(configs[number], run=replace(configs[number].run, folder=folder / name))
        log.info("%-12s%s", name, "  ".join(change))
    return folder, configs


def on_gpus(config: Config) -> Config:
    """Return the configuration for other machines: this one may have no GPUs, and "auto" must not fall back there."""
    return replace(config, train=replace(config.train, device="cuda")) if config.train.device == "auto" else config


def job_of(run: Path, configs: Sequence[Config], *, is_array: bool, site: Path | None, **shape: Any) -> SlurmJob:
    """Return the job of the runs, from the current folder; raises ConfigError for one that could not start.

    run: the folder of the run, or that of an array's. shape: further fields of SlurmJob.
    """
    run = Path.cwd() / run
    job = SlurmJob(
        run=run,
        submitted=next_submission(run),
        workdir=Path.cwd(),
        python=Path(sys.executable),
        gpus=any(config.train.device == "cuda" for config in configs),
        elements=len(configs) if is_array else 0,
        site=load_site(site or site_file()),
        **shape,
    )
    job.check()
    return job


def check_submission(job: SlurmJob, configs: Sequence[Config], chain: int = 1) -> None:
    """Raise FarspanError where the job could not be submitted or its runs would refuse to start; print what they do."""
    check_ready(job.run)
    for config in configs:
        open_data(config)
        dry_run_plan(config, job.nodes * job.ranks_per_node)
    log.info("%s", job.describe(chain))

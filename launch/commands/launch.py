"""`farspan launch local|slurm`: all ranks of a run, on this machine or as a SLURM job."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.errors import ConfigError
from farspan.launch.commands.arguments import (
    Subparsers,
    add_command,
    add_config_arguments,
    add_site,
    add_subparsers,
    check_count,
    config_of,
    expanded_argument,
    print_dry_run,
)
from farspan.launch.commands.jobs import status_command
from farspan.launch.env import check_single_task, site_file
from farspan.launch.local import LocalJob
from farspan.trainer.resilience.signals import stopped_at_once

if TYPE_CHECKING:
    from farspan.trainer.config import Config

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    commands = add_subparsers(subparsers.add_parser("launch", help="start all ranks of a run"), "WHERE")
    local = add_command(commands, "local", run_local, "on this machine")
    add_config_arguments(local)
    local.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="number of ranks; without GPUs, CPU processes"
    )

    slurm = add_command(commands, "slurm", run_slurm, "as a SLURM job")
    add_config_arguments(slurm, "print the batch script; submit nothing; derived values go to standard error")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="ranks; CPU processes with train.device=cpu"
    )
    slurm.add_argument("--time", metavar="LIMIT", help="such as 90 (minutes), 4:00:00 or 2-00:00:00")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--constraint", metavar="WORD", help="features that nodes must have")
    slurm.add_argument(
        "--container", type=expanded_argument, metavar="IMAGE", help="started as [container] of the site's file says"
    )
    add_site(slurm)
    slurm.add_argument(
        "--task-per-rank", action="store_true", help="SLURM starts each rank; default: torchrun on each node"
    )
    slurm.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="submit N jobs that continue one after another, for runs longer than the time limit",
    )
    slurm.add_argument(
        "--each",
        action="append",
        default=[],
        metavar="section.key=A,B,...",
        help="submit a job array: the first run has value A, the second B, in run.folder/000, 001 and so on; if given "
        "several times, the values change together",
    )
    slurm.add_argument("--at-most", type=int, metavar="N", help="how many runs of --each run at a time; default: all")


def run_local(options: argparse.Namespace) -> int:
    num_ranks = options.gpus_per_node
    job = LocalJob(config=options.config, overrides=tuple(options.overrides), num_ranks=num_ranks)
    if options.dry_run:
        print_dry_run(options, num_ranks, flag="--gpus-per-node")
        log.info("%-12s%s", "by torchrun", job.command_line())
        return 0
    check_count(num_ranks, "--gpus-per-node")
    check_single_task()
    with stopped_at_once():
        from farspan.parallel.ranks import Ranks
        from farspan.trainer.resolve import resolve

        # Checked before the ranks start, so that an error is reported once. The last rank needs the most GPUs.
        resolve(config_of(options), Ranks(world_size=num_ranks, local_rank=num_ranks - 1))
    return job.run()


def run_slurm(options: argparse.Namespace) -> None:
    """Submit a run, or several as a job array, or print the batch script."""
    from farspan.launch.slurm.job import SlurmJob
    from farspan.launch.slurm.site import load_site
    from farspan.launch.slurm.submit import check_ready, next_submission, submit
    from farspan.trainer.resolve import dry_run, dry_run_plan, open_data
    from farspan.trainer.toml_config import to_toml

    check_count(options.chain, "--chain")
    run_folder, configs = _slurm_configs(options)
    run = Path.cwd() / run_folder
    job = SlurmJob(
        run=run,
        submitted=next_submission(run),
        workdir=Path.cwd(),
        python=Path(sys.executable),
        nodes=options.nodes,
        ranks_per_node=options.gpus_per_node,
        gpus=any(config.train.device == "cuda" for config in configs),
        time=options.time,
        partition=options.partition,
        constraint=options.constraint,
        container=options.container,
        task_per_rank=options.task_per_rank,
        elements=len(configs) if options.each else 0,
        at_most=options.at_most,
        site=load_site(options.site or site_file()),
    )
    job.check()
    num_ranks = options.nodes * options.gpus_per_node
    if options.dry_run:
        for config in configs:
            dry_run(config, num_ranks)
        log.info("%s", job.describe(options.chain))
        print(job.script(), end="")
        return
    check_ready(run)
    for config in configs:
        open_data(config)
        dry_run_plan(config, num_ranks)
    log.info("%s", job.describe(options.chain))
    ids = submit(job, [to_toml(config) for config in configs], options.chain)
    log.info("%-12s%s; see %s", "submitted", " then ".join(ids), status_command(run_folder))


def _slurm_configs(options: argparse.Namespace) -> "tuple[Path, list[Config]]":
    """Return run.folder and the configurations of the runs: one, or one for each element of an array."""
    from farspan.launch.slurm.job import element_name
    from farspan.trainer.config import Config
    from farspan.trainer.toml_config import load_config

    folder = config_of(options).run.folder
    changes = _array_overrides(options.each)
    configs = [load_config(Config, options.config, [*options.overrides, *change]) for change in changes or [()]]
    for number, change in enumerate(changes):
        name = element_name(number)
        configs[number] = replace(configs[number], run=replace(configs[number].run, folder=folder / name))
        log.info("%-12s%s", name, "  ".join(change))
    # This machine may have no GPUs, and on the job's nodes "auto" must not fall back to the CPU.
    return folder, [
        replace(config, train=replace(config.train, device="cuda")) if config.train.device == "auto" else config
        for config in configs
    ]


def _array_overrides(each: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each run of a job array, which change together, from `section.key=A,B,...`."""
    columns = []
    for text in each:
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--each {text} has no values; write it as section.key=A,B,...")
        if key.strip() == "run.folder":
            raise ConfigError("--each run.folder=... is not possible: each run has a numbered folder in run.folder.")
        columns.append([f"{key}={value.strip()}" for value in values.split(",")])
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(str(len(column)) for column in columns)
        raise ConfigError(f"all --each must have as many values, since they change together; these have {counts}.")
    return list(zip(*columns, strict=True))

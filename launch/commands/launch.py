"""`farspan launch local|slurm|submitit`: all ranks of a run, on this machine or as a SLURM job."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from farspan.errors import ConfigError
from farspan.launch.commands.arguments import (
    Subparsers,
    add_command,
    add_config_arguments,
    add_overrides,
    add_site,
    add_subparsers,
    check_count,
    config_of,
    expanded_argument,
    print_dry_run,
)
from farspan.launch.commands.jobs import status_command
from farspan.launch.env import check_single_task
from farspan.launch.local import LocalJob
from farspan.trainer.resilience.signals import stopped_at_once

JOB_OPTIONS = ("time", "partition", "constraint", "container", "task_per_rank", "site")

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
    _add_job_arguments(slurm)
    slurm.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="submit N jobs that continue one after another, for runs longer than the time limit",
    )

    submitit = add_command(commands, "submitit", run_submitit, "as a submitit job, on SLURM or on this machine")
    submitit.add_argument("config", type=Path, help="TOML file, such as configs/demo.toml")
    add_overrides(submitit)
    submitit.add_argument(
        "--executor",
        choices=("slurm", "local"),
        default="slurm",
        help="default: slurm; local: on this machine, in the background",
    )
    _add_job_arguments(submitit)


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="ranks; CPU processes with train.device=cpu"
    )
    parser.add_argument("--time", metavar="LIMIT", help="such as 90 (minutes), 4:00:00 or 2-00:00:00")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--constraint", metavar="WORD", help="features that nodes must have")
    parser.add_argument(
        "--container", type=expanded_argument, metavar="IMAGE", help="started as [container] of the site's file says"
    )
    add_site(parser)
    parser.add_argument(
        "--task-per-rank", action="store_true", help="SLURM starts each rank; default: torchrun on each node"
    )
    parser.add_argument(
        "--each",
        action="append",
        default=[],
        metavar="section.key=A,B,...",
        help="submit a job array: the first run has value A, the second B, in run.folder/000, 001 and so on; if given "
        "several times, the values change together",
    )
    parser.add_argument("--at-most", type=int, metavar="N", help="how many runs of --each run at a time; default: all")


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
    from farspan.launch.slurm.prepare import check_submission, job_of, load_runs, on_gpus
    from farspan.launch.slurm.submit import submit
    from farspan.trainer.resolve import dry_run
    from farspan.trainer.toml_config import to_toml

    check_count(options.chain, "--chain")
    run_folder, configs = load_runs(options.config, options.overrides, _array_overrides(options.each))
    configs = [on_gpus(config) for config in configs]
    job = job_of(
        run_folder,
        configs,
        is_array=bool(options.each),
        ranks_per_node=options.gpus_per_node,
        **{name: getattr(options, name) for name in ("nodes", "at_most", *JOB_OPTIONS)},
    )
    if options.dry_run:
        for config in configs:
            dry_run(config, job.nodes * job.ranks_per_node)
        log.info("%s", job.describe(options.chain))
        print(job.script(), end="")
        return
    check_submission(job, configs, options.chain)
    ids = submit(job, [to_toml(config) for config in configs], options.chain)
    log.info("%-12s%s; see %s", "submitted", " then ".join(ids), status_command(run_folder))


def run_submitit(options: argparse.Namespace) -> None:
    """Submit a run, or several as a job array, with submitit."""
    from farspan.launch.submitit_jobs import submit_jobs

    jobs = submit_jobs(
        options.config,
        _array_overrides(options.each),
        options.at_most,
        **{name: getattr(options, name) for name in ("executor", "overrides", "nodes", "gpus_per_node", *JOB_OPTIONS)},
    )
    logs = jobs[0].paths.folder  # run.folder/submitted/NUMBER/submitit
    where = status_command(logs.parents[2]) if options.executor == "slurm" else logs
    log.info("%-12s%s; see %s", "submitted", ", ".join(job.job_id for job in jobs), where)


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

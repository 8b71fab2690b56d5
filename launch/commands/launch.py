"""The commands that need SLURM: `launch slurm` and `jobs`."""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from farspan.launch.commands.arguments import add_config_arguments, add_site, check_count
from farspan.launch.env import site_file

log = logging.getLogger("farspan")


def add_slurm(launch: "argparse._SubParsersAction") -> None:
    """Add the command `slurm`."""
    slurm = launch.add_parser("slurm", help="as a job of SLURM")
    add_config_arguments(slurm, "print the batch script and submit nothing; what is derived goes to standard error")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="ranks; CPU processes with train.device=cpu"
    )
    slurm.add_argument("--time", metavar="LIMIT", help="such as 90 (minutes), 4:00:00 or 2-00:00:00")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--constraint", metavar="WORD", help="features that nodes must have")
    slurm.add_argument("--container", metavar="IMAGE", help="started as [container] of the site's file says")
    add_site(slurm)
    slurm.add_argument(
        "--task-per-rank", action="store_true", help="SLURM starts each rank; else torchrun on each node"
    )
    slurm.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="jobs that go on one after another, for more than the time limit",
    )
    slurm.add_argument(
        "--each",
        action="append",
        default=[],
        metavar="section.key=A,B,...",
        help="a job array, whose first run has A and whose second has B, in run.folder/000, 001 and so on; given "
        "several times, all change together",
    )
    slurm.set_defaults(command=launch_slurm)


def add_jobs(jobs: "argparse._SubParsersAction") -> None:
    """Add the commands that look after jobs."""
    about = {
        "status": ("their states, the run's last failures and its last step", _jobs_status),
        "cancel": ("end them", _jobs_cancel),
        "resume": ("submit the last of them anew, with its code and configuration", _jobs_resume),
        "logs": ("what they print", _jobs_logs),
    }
    parsers = {name: jobs.add_parser(name, help=text) for name, (text, _) in about.items()}
    for name, parser in parsers.items():
        parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        parser.set_defaults(command=about[name][1])
    add_site(parsers["resume"])
    parsers["logs"].add_argument("--rank", type=int, metavar="N", help="of one rank; else of all, in one log")
    parsers["logs"].add_argument("--follow", action="store_true", help="go on, until Ctrl-C")


def launch_slurm(options: argparse.Namespace) -> int:
    """Submit a run, or several as a job array, or print the batch script."""
    from farspan.launch.slurm.array import sweep
    from farspan.launch.slurm.job import SlurmJob, element_name
    from farspan.launch.slurm.site import load_site
    from farspan.launch.slurm.submit import check_ready, next_submission, submit
    from farspan.trainer.config import Config
    from farspan.trainer.estimate.dry_run import dry_run, rehearse
    from farspan.trainer.resolve import open_data
    from farspan.trainer.toml_config import load_config, to_toml

    check_count(options.chain, "--chain")
    config = load_config(Config, options.config, options.overrides)
    changes = sweep(options.each)
    configs = [load_config(Config, options.config, [*options.overrides, *change]) for change in changes] or [config]
    run = Path.cwd() / config.run.folder
    for number, change in enumerate(changes):
        name = element_name(number)
        configs[number] = replace(configs[number], run=replace(configs[number].run, folder=config.run.folder / name))
        log.info("%-12s%s", name, "  ".join(change))
    # Here there may be none; where the job runs, no CPU shall stand in for a GPU unasked.
    configs = [
        replace(each, train=replace(each.train, device="cuda")) if each.train.device == "auto" else each
        for each in configs
    ]
    job = SlurmJob(
        run=run,
        submitted=next_submission(run),
        workdir=Path.cwd(),
        python=Path(sys.executable),
        nodes=options.nodes,
        ranks_per_node=options.gpus_per_node,
        gpus=any(each.train.device == "cuda" for each in configs),
        time=options.time,
        partition=options.partition,
        constraint=options.constraint,
        container=options.container,
        task_per_rank=options.task_per_rank,
        elements=len(changes),
        site=load_site(options.site or site_file()),
    )
    job.check()
    num_ranks = options.nodes * options.gpus_per_node
    if options.dry_run:
        for each in configs:
            dry_run(each, num_ranks)
        print(job.script(), end="")
        return 0
    check_ready(run)
    for each in configs:
        open_data(each)
        rehearse(each, num_ranks)
    ids = submit(job, [to_toml(each) for each in configs], options.chain)
    log.info("%-12s%s; see `farspan jobs status %s`", "submitted", " then ".join(ids), config.run.folder)
    return 0


def _jobs_status(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import status

    log.info("%s", status(options.run))
    return 0


def _jobs_cancel(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import cancel

    ids = cancel(options.run)
    log.info("%-12s%s", "cancelled", ", ".join(ids) or "nothing: no job of this run is left")
    return 0


def _jobs_resume(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.site import load_site
    from farspan.launch.slurm.submit import resume

    # Paths in the queue are absolute.
    job = resume(Path.cwd() / options.run, load_site(options.site or site_file()).exclusion)
    log.info("%-12s%s; see `farspan jobs status %s`", "submitted", job, options.run)
    return 0


def _jobs_logs(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import log_file, show_log

    return show_log(log_file(options.run, options.rank), follow=options.follow)

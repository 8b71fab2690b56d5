"""`farspan jobs status|cancel|resume|logs`: a run's SLURM jobs."""

import argparse
import logging
from pathlib import Path

from farspan.launch.commands.arguments import Subparsers, add_site, add_subparsers
from farspan.launch.env import site_file

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    commands = add_subparsers(subparsers.add_parser("jobs", help="watch and stop the SLURM jobs of a run"), "COMMAND")
    about = {
        "status": ("show their states, the run's last failures and its last step", _status),
        "cancel": ("cancel those that have not ended", _cancel),
        "resume": ("submit the last one again, with its code and configuration", _resume),
        "logs": ("show what they print", _logs),
    }
    parsers = {name: commands.add_parser(name, help=text) for name, (text, _) in about.items()}
    for name, parser in parsers.items():
        parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        parser.set_defaults(command=about[name][1])
    add_site(parsers["resume"])
    parsers["logs"].add_argument("--rank", type=int, metavar="N", help="only this rank; default: all, in one log")
    parsers["logs"].add_argument("--follow", action="store_true", help="keep printing new lines until Ctrl-C")


def _status(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import status

    log.info("%s", status(options.run))
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import cancel

    log.info("%-12s%s", "canceled", ", ".join(cancel(options.run)) or "nothing: all jobs of this run have ended")
    return 0


def _resume(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.site import load_site
    from farspan.launch.slurm.submit import resume

    # The job's own folder is not this one, so the path of the run has to be absolute.
    job = resume(Path.cwd() / options.run, load_site(options.site or site_file()).exclusion)
    log.info("%-12s%s; see `farspan jobs status %s`", "submitted", job, options.run)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from farspan.launch.slurm.jobs import log_file, show_log

    return show_log(log_file(options.run, options.rank), follow=options.follow)

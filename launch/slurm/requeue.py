"""The start and the end of a SLURM job, run by its batch script: may it start, and is it queued again?

before: refuses a job that was started too often or fails in a row, and records nodes that SLURM lost under it.
after: reads how the ranks ended, records what failed and where, and queues the job again unless that is of no use.
"""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from farspan.launch.slurm import history
from farspan.launch.slurm.client import SlurmError, run_slurm
from farspan.trainer.resilience.signals import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_UNFIT,
    EXIT_USER_ERROR,
    EXIT_WARNED,
    KILLED,
    UNFIT_FILE,
)

HARDWARE_SIGNALS = {signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE}
"""Deaths for which the node is to blame. SIGABRT is none, as a lost peer may end a rank by it. SLURM's own SIGKILL does
not count either: it also ends the shell that would record it."""
DEATHS = {KILLED + number: number.name for number in HARDWARE_SIGNALS}
DOWN_STATES = "down,drain,fail"


class EndCause(Enum):
    """Why a job ends. EXTERNAL: a user canceled it, or SLURM ended it and queues it again by itself."""

    RANKS_ENDED = "ranks ended"
    PREEMPTION = "preemption"
    TIME_LIMIT = "time limit"
    EXTERNAL = "external"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskExit:
    """How a task ended on one node. A task is all ranks of the node or, with a task for each rank, one of them."""

    node: str
    host: str
    status: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """status: of the job. requeue: whether another start may help. failure: what failed. nodes: those to blame."""

    status: int
    requeue: bool
    failure: str | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStart:
    """One start of a job. restarts: how many there were before. requeues, max_failures, exclusion: see `Site`."""

    run: Path
    job: str
    restarts: int
    script: Path
    requeues: int
    max_failures: int
    exclusion: history.ExclusionPolicy

    def logs(self, restart: int) -> Path:
        return history.logs_of_start(self.run, self.job, restart)

    def before(self) -> int:
        """Return 0 if the job may start, else its exit status."""
        if self.restarts > self.requeues:
            report(f"the job was queued again {self.requeues} times, the most allowed; {self.resume_hint()}.")
            history.write_end(self.logs(self.restarts), is_requeued=False)
            return EXIT_WARNED
        lost = self.lost_nodes()
        if lost:
            report(f"SLURM lost {', '.join(lost)} under the job.")
            history.add_failure(self.run, self.job, "lost by SLURM", lost)
        if self.too_many_failures():
            history.write_end(self.logs(self.restarts), is_requeued=False)
            return EXIT_FAILED
        return 0

    def after(self, srun_status: int, *, got_sigterm: bool) -> int:
        """Act on how the ranks ended and return the exit status of the job. got_sigterm: the batch script was."""
        cause = self.end_cause(got_sigterm=got_sigterm)
        if cause is EndCause.EXTERNAL:
            return srun_status
        outcome = self.outcome(srun_status, cause)
        history.write_end(self.logs(self.restarts), is_requeued=False)
        if outcome.failure is not None:
            report(f"{outcome.failure}.")
            history.add_failure(self.run, self.job, outcome.failure, outcome.nodes)
            if self.too_many_failures():
                return outcome.status
        if outcome.requeue:
            self.requeue()
        return outcome.status

    def outcome(self, srun_status: int, cause: EndCause) -> Outcome:
        """Decide by the exits on all nodes: a rank that dies takes others with it, and they end in many ways."""
        exits = list(read_exits(self.logs(self.restarts) / "ended"))
        statuses = {srun_status, *(task.status for task in exits)}
        if cause is EndCause.TIME_LIMIT and not statuses <= {0, EXIT_WARNED}:
            return Outcome(status=EXIT_FAILED, requeue=True, failure="the time limit came before the ranks had saved")
        if cause is not EndCause.RANKS_ENDED:
            return Outcome(status=EXIT_WARNED, requeue=True)
        killed = {task.node: DEATHS[task.status] for task in exits if task.status in DEATHS}
        if killed:
            failure = ", ".join(f"a rank on {node} was killed by {name}" for node, name in sorted(killed.items()))
            return Outcome(status=EXIT_FAILED, requeue=True, failure=failure, nodes=tuple(sorted(killed)))
        if EXIT_UNFIT in statuses:
            bad = read_bad_nodes(self.run, exits)
            failure = ", ".join(f"{node} is bad ({reason})" for node, reason in bad.items()) or "a node is bad"
            return Outcome(status=EXIT_UNFIT, requeue=True, failure=failure, nodes=tuple(bad))
        if EXIT_USER_ERROR in statuses:
            return Outcome(status=EXIT_USER_ERROR, requeue=False)
        if EXIT_WARNED in statuses:
            return Outcome(status=EXIT_WARNED, requeue=True)
        if EXIT_HUNG in statuses:
            return Outcome(status=EXIT_HUNG, requeue=True, failure="ranks hung")
        if statuses != {0}:
            failure = f"ranks failed with exit status {max(statuses)}"
            return Outcome(status=EXIT_FAILED, requeue=True, failure=failure)
        return Outcome(status=0, requeue=False)

    def end_cause(self, *, got_sigterm: bool) -> EndCause:
        try:
            shown = run_slurm(["scontrol", "show", "job", self.job])
        except SlurmError:
            shown = ""
        fields = dict(re.findall(r"(\w+)=(\S+)", shown))
        # Before SLURM requeues a preempted job, it sends SIGTERM to the ranks, and takes a job that then ends for
        # completed. PreemptTime stays from earlier starts, hence the comparison.
        preempted = fields.get("PreemptTime", "None")
        if fields.get("JobState") == "RUNNING" and preempted != "None" and preempted >= fields["StartTime"]:
            return EndCause.PREEMPTION
        if not got_sigterm:
            return EndCause.RANKS_ENDED
        return EndCause.TIME_LIMIT if fields.get("Reason") == "TimeLimit" else EndCause.EXTERNAL

    def too_many_failures(self) -> bool:
        if history.consecutive_failures(self.run) < self.max_failures:
            return False
        newest, file = history.newest_checkpoint(self.run), self.run / history.FAILURES_FILE
        report(
            f"{self.max_failures} failures in a row with no newer checkpoint ({newest}): the job ends; see {file}, and "
            f"{self.resume_hint()}."
        )
        return True

    def requeue(self) -> None:
        if self.restarts >= self.requeues:
            report(f"not queued again, as restart {self.restarts} was the last one allowed; {self.resume_hint()}.")
            return
        report(f"queued again, restart {self.restarts + 1} of at most {self.requeues}.")
        nodes = history.nodes_to_exclude([self.run], self.script, self.exclusion, report)
        try:
            # SLURM takes the list of nodes only after the requeue, which sends SIGTERM; the batch script ignores that.
            run_slurm(["scontrol", "requeue", self.job])
            history.write_end(self.logs(self.restarts), is_requeued=True)
            if nodes is not None:
                run_slurm(["scontrol", "update", f"JobId={self.job}", f"ExcNodeList={nodes}"])
        except SlurmError as error:
            report(f"{error}; if the job is not queued again, {self.resume_hint()}.")

    def lost_nodes(self) -> list[str]:
        """Return the nodes of the job's last start that are down now, if SLURM ended that start."""
        last = self.logs(self.restarts - 1)
        if self.restarts == 0 or not (last / "nodes").exists() or history.has_ended(last):
            return []
        nodes = ",".join((last / "nodes").read_text().split())
        sinfo = ["sinfo", "--noheader", "--Node", f"--nodes={nodes}", f"--states={DOWN_STATES}", "--format=%N"]
        try:
            return sorted(set(run_slurm(sinfo).split()))
        except SlurmError as error:
            report(f"cannot check for lost nodes: {error}")
            return []

    def resume_hint(self) -> str:
        return f"continue with `farspan jobs resume {shlex.quote(str(self.run))}`"


def read_exits(folder: Path) -> Iterator[TaskExit]:
    """Yield what the tasks of a job wrote there: node, host and exit status. A full disk may have cut it short."""
    for path in sorted(folder.iterdir()):
        match path.read_text().split():
            case [node, host, status] if status.isdecimal():
                yield TaskExit(node=node, host=host, status=int(status))


def read_bad_nodes(run: Path, exits: Sequence[TaskExit]) -> dict[str, str]:
    """Return why nodes failed the preflight check, by node, and delete the run's record of it."""
    path = run / UNFIT_FILE
    nodes = {task.host: task.node for task in exits}
    lines = [line.partition(" ") for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return {nodes.get(host, host): reason.strip() for host, _, reason in lines}


def report(message: str) -> None:
    print(f"farspan: {message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="farspan.launch.slurm.requeue", description="Start or end a SLURM job.")
    parser.add_argument("when", choices=("before", "after"))
    for name in ("run", "script"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("restarts", "requeues", "max-failures", "max-excluded"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--exclude-hours", type=float, required=True)
    parser.add_argument("--exclude", default="")
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--got-sigterm", action="store_true")
    options = vars(parser.parse_args(arguments))
    when, status, got_sigterm = (options.pop(name) for name in ("when", "status", "got_sigterm"))
    exclusion = history.ExclusionPolicy(
        hours=options.pop("exclude_hours"), max_nodes=options.pop("max_excluded"), always=options.pop("exclude")
    )
    start = JobStart(**options, exclusion=exclusion)
    return start.before() if when == "before" else start.after(status, got_sigterm=got_sigterm)


if __name__ == "__main__":
    sys.exit(main())

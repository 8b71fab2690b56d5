"""The start and the end of a job of SLURM, run by its batch script: whether it starts, and whether it starts again.

before: refuses a job that was started too often or fails in a row, and notes nodes that SLURM lost under it.
after: reads how the ranks ended, notes what failed and where, and queues the job again unless that is of no use.
"""

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from farspan.launch.slurm.client import SlurmError, slurm
from farspan.launch.slurm.failures import Exclusion, exclude, failed_in_a_row, newest_checkpoint, record
from farspan.launch.slurm.history import last_submitted
from farspan.trainer.resilience.signals import EXIT_HUNG, EXIT_UNFIT, EXIT_USER_ERROR, EXIT_WARNED, KILLED, UNFIT_FILE

EXIT_FAILED = 1
BLAMED = {signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE}
"""Deaths that speak against the node. A lost peer may end a rank by SIGABRT. SLURM's own SIGKILL also ends the shell
that would tell of it."""
DOWN = "down,drain,fail"


class EndedBy(Enum):
    """Who has put an end to a job. OTHERS: a user who cancelled it, or SLURM, which then queues it again itself."""

    ITSELF = "itself"
    PREEMPTION = "preemption"
    TIME_LIMIT = "time limit"
    OTHERS = "others"


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How what SLURM started on one node ended: all its ranks or, with a task for each rank, one of them."""

    node: str
    host: str
    status: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """status: of the job. why: what failed, in words; None if nothing has. nodes: to blame. again: worth another try"""

    status: int
    again: bool
    why: str | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One start of a job. restarts: how many there were before. requeues: how many there may be. See `Site`."""

    run: Path
    id: str
    restarts: int
    script: Path
    requeues: int
    max_failures: int
    exclusion: Exclusion

    def logs(self, restart: int) -> Path:
        return self.run / "logs" / self.id / str(restart)

    def before(self) -> int:
        """Return 0 if the job may start, else its exit status."""
        if self.restarts > self.requeues:
            say(f"the job was started again {self.requeues} times, the most that it may be; {self.go_on()}.")
            return EXIT_WARNED
        lost = self.lost_nodes()
        if lost:
            say(f"SLURM has lost {', '.join(lost)} under the job.")
            record(self.run, self.id, "lost by SLURM", lost)
        return EXIT_FAILED if self.gives_up() else 0

    def after(self, status: int, *, told: bool) -> int:
        """Act on how the ranks ended and return the exit status of the job.

        status: that of srun. told: the job's own shell was sent SIGTERM.
        """
        ended_by = self.ended_by(told=told)
        if ended_by is EndedBy.OTHERS:
            return status
        outcome = self.outcome(status, ended_by)
        (self.logs(self.restarts) / "over").touch()
        if outcome.why is not None:
            say(f"{outcome.why}.")
            record(self.run, self.id, outcome.why, outcome.nodes)
            if self.gives_up():
                return outcome.status
        if outcome.again:
            self.queue_again()
        return outcome.status

    def outcome(self, status: int, ended_by: EndedBy) -> Outcome:
        """Judge by the ends on all nodes: one rank that dies takes others with it, which end in many ways."""
        ends = list(read_ends(self.logs(self.restarts) / "ended"))
        statuses = {status, *(end.status for end in ends)}
        if ended_by is EndedBy.TIME_LIMIT and not statuses <= {0, EXIT_WARNED}:
            return Outcome(status=EXIT_FAILED, again=True, why="the time was over before the ranks had saved")
        if ended_by is not EndedBy.ITSELF:
            return Outcome(status=EXIT_WARNED, again=True)
        killed = {end.node: KILLED_BY[end.status] for end in ends if end.status in KILLED_BY}
        if killed:
            how = ", ".join(f"a rank on {node} was killed by {name}" for node, name in sorted(killed.items()))
            return Outcome(status=EXIT_FAILED, again=True, why=how, nodes=tuple(sorted(killed)))
        if EXIT_UNFIT in statuses:
            unfit = read_unfit(self.run, ends)
            how = ", ".join(f"{node} is unfit ({why})" for node, why in unfit.items()) or "a node is unfit"
            return Outcome(status=EXIT_UNFIT, again=True, why=how, nodes=tuple(unfit))
        if EXIT_USER_ERROR in statuses:
            return Outcome(status=EXIT_USER_ERROR, again=False)
        if EXIT_WARNED in statuses:
            return Outcome(status=EXIT_WARNED, again=True)
        if EXIT_HUNG in statuses:
            return Outcome(status=EXIT_HUNG, again=True, why="ranks hung")
        if statuses != {0}:
            return Outcome(status=EXIT_FAILED, again=True, why=f"ranks failed with exit status {max(statuses)}")
        return Outcome(status=0, again=False)

    def ended_by(self, *, told: bool) -> EndedBy:
        """Return who has put an end to the job."""
        try:
            shown = slurm(["scontrol", "show", "job", self.id])
        except SlurmError:
            shown = ""
        fields = dict(re.findall(r"(\w+)=(\S+)", shown))
        # Before others go first, SLURM sends SIGTERM to the ranks and takes a job that ends of it for completed. Of an
        # earlier start, PreemptTime is of no interest.
        preempted = fields.get("PreemptTime", "None")
        if fields.get("JobState") == "RUNNING" and preempted != "None" and preempted >= fields["StartTime"]:
            return EndedBy.PREEMPTION
        if not told:
            return EndedBy.ITSELF
        return EndedBy.TIME_LIMIT if fields.get("Reason") == "TimeLimit" else EndedBy.OTHERS

    def gives_up(self) -> bool:
        if failed_in_a_row(self.run, since=last_submitted(self.run)) < self.max_failures:
            return False
        say(
            f"{self.max_failures} failures in a row with no newer checkpoint ({newest_checkpoint(self.run)}): the job "
            f"ends; see {self.run / 'failures.jsonl'}, and {self.go_on()}."
        )
        return True

    def queue_again(self) -> None:
        if self.restarts >= self.requeues:
            say(f"not queued again, as restart {self.restarts} was the last that it may have; {self.go_on()}.")
            return
        say(f"queued again, restart {self.restarts + 1} of {self.requeues} at most.")
        nodes = exclude([self.run], self.script, self.exclusion, say)
        try:
            # At that SLURM sends SIGTERM, which the batch script ignores: the list of nodes is only taken afterwards.
            slurm(["scontrol", "requeue", self.id])
            if nodes is not None:
                slurm(["scontrol", "update", f"JobId={self.id}", f"ExcNodeList={nodes}"])
        except SlurmError as error:
            say(f"{error}; if the job is not queued again, {self.go_on()}.")

    def lost_nodes(self) -> list[str]:
        """Return the nodes of the job's last start that are down now, if SLURM put an end to it."""
        last = self.logs(self.restarts - 1)
        if self.restarts == 0 or not (last / "nodes").exists() or (last / "over").exists():
            return []
        nodes = ",".join((last / "nodes").read_text().split())
        try:
            listed = slurm(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", f"--states={DOWN}", "--format=%N"])
        except SlurmError as error:
            say(f"whether nodes were lost is not known: {error}")
            return []
        return sorted(set(listed.split()))

    def go_on(self) -> str:
        return f"go on with `farspan jobs resume {self.run}`"


KILLED_BY = {KILLED + number: signal.Signals(number).name for number in BLAMED}


def read_ends(folder: Path) -> Iterator[End]:
    """Yield what the tasks of a job have left there, as far as a full disk let them: node, host and exit status."""
    for path in sorted(folder.iterdir()):
        match path.read_text().split():
            case [node, host, status] if status.isdecimal():
                yield End(node=node, host=host, status=int(status))


def read_unfit(run: Path, ends: Sequence[End]) -> dict[str, str]:
    """Return what makes nodes unfit, and forget it."""
    path = run / UNFIT_FILE
    nodes = {end.host: end.node for end in ends}
    lines = [line.partition(" ") for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return {nodes.get(host, host): why.strip() for host, _, why in lines}


def say(what: str) -> None:
    print(f"farspan: {what}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="farspan.launch.slurm.requeue", description="Start or end a job of SLURM.")
    parser.add_argument("when", choices=("before", "after"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--requeues", type=int, required=True)
    parser.add_argument("--max-failures", type=int, required=True)
    parser.add_argument("--exclude-hours", type=float, required=True)
    parser.add_argument("--max-excluded", type=int, required=True)
    parser.add_argument("--exclude", default="")
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--told", action="store_true")
    options = parser.parse_args(arguments)
    job = Job(
        run=options.run,
        id=options.job,
        restarts=options.restarts,
        script=options.script,
        requeues=options.requeues,
        max_failures=options.max_failures,
        exclusion=Exclusion(hours=options.exclude_hours, most=options.max_excluded, always=options.exclude),
    )
    return job.before() if options.when == "before" else job.after(options.status, told=options.told)


if __name__ == "__main__":
    sys.exit(main())

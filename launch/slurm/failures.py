"""What a run's jobs failed of, and on which nodes: one file in its folder, read before it is submitted or starts again.

The ends of jobs use this before anything is installed around them: only Python's own library is imported.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from farspan.launch.slurm.client import SlurmError, slurm
from farspan.trainer.checkpoint.steps import finished

FILE = "failures.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """hours: how long nodes that failed are left out. most: how many. always: nodes that the site leaves out anyway."""

    hours: float
    most: int
    always: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """when: in ISO form. job: its id. reason: in words. nodes: those to blame. checkpoint: the newest at that time."""

    when: str
    job: str
    reason: str
    nodes: tuple[str, ...]
    checkpoint: str | None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def record(run: Path, job: str, reason: str, nodes: Sequence[str]) -> None:
    """Write down a failure of the run."""
    failure = Failure(when=now(), job=job, reason=reason, nodes=tuple(nodes), checkpoint=newest_checkpoint(run))
    with (run / FILE).open("a") as file:
        file.write(json.dumps(asdict(failure)) + "\n")


def failures(run: Path) -> list[Failure]:
    """Return what is on record, oldest first."""
    path, found = run / FILE, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        # A full disk or a dying node may have cut it short, which must keep no job from starting.
        with suppress(ValueError, TypeError, KeyError):
            values = json.loads(line)
            found.append(Failure(**values | {"nodes": tuple(values["nodes"])}))
    return found


def newest_checkpoint(run: Path) -> str | None:
    found = finished(run / "checkpoints")
    return found[-1].name if found else None


def failed_in_a_row(run: Path, since: str) -> int:
    """Return how many of the last failures, none before `since`, have the newest checkpoint of now."""
    newest, count = newest_checkpoint(run), 0
    for failure in reversed(failures(run)):
        if failure.checkpoint != newest or failure.when < since:
            break
        count += 1
    return count


def failed_nodes(runs: Sequence[Path], hours: float) -> list[str]:
    """Return the nodes to blame for failures within so many hours, the last to fail first."""
    oldest = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
    recent = sorted((f for run in runs for f in failures(run) if f.when > oldest), key=lambda f: f.when, reverse=True)
    return list(dict.fromkeys(node for failure in recent for node in failure.nodes))


def exclude(runs: Sequence[Path], script: Path, rule: Exclusion, say: Callable[[str], object]) -> str | None:
    """Return the list of nodes that a job of the runs shall do without, as SLURM takes it, or None for no change.

    A node that failed is left out only while the job can still run without it; else that is said.
    """
    failed = failed_nodes(runs, rule.hours)[: rule.most]
    for count in range(len(failed), 0, -1):
        nodes = ",".join([*([rule.always] if rule.always else []), *failed[:count]])
        try:
            # SLURM knows best: it heeds partition, constraint, GPUs and nodes that are down.
            slurm(["sbatch", "--test-only", f"--exclude={nodes}", str(script)])
        except SlurmError as error:
            say(f"{failed[count - 1]} failed but is not left out, as the job could not run without it: {error}")
        else:
            say(f"left out, as the run failed there: {', '.join(failed[:count])}")
            return nodes
    return None

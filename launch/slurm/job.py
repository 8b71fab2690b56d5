"""A run as a job of SLURM: what it asks for, and the batch script that says so."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from farspan.errors import ConfigError
from farspan.launch.slurm.site import SIGNAL_EARLY_S, Site
from farspan.trainer.resilience.signals import EXIT_WARNED, WARNING_SIGNAL

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Below those that Linux gives out by itself."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
UNFIT_FOR_PATHS = re.compile(r"[^\w./,+=:@~ -]")
"""SLURM gives some of these, such as %, a meaning of its own, and #SBATCH lines have rules for quotes of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """`nodes` times `ranks_per_node` processes that run `farspan train`.

    run: the run's folder. submitted: the folder below it with this script, the configuration and the code that the job
    runs. workdir: what relative paths in the configuration start from. python: the interpreter. gpus: whether to ask
    for a GPU for each rank. time: as sbatch takes it. container: an image. task_per_rank: SLURM starts the ranks, not
    torchrun. elements: of a job array, each of which is a run of its own, in a numbered folder of `run`; 0: no array.
    """

    run: Path
    submitted: Path
    workdir: Path
    python: Path
    nodes: int
    ranks_per_node: int
    gpus: bool
    time: str | None = None
    partition: str | None = None
    constraint: str | None = None
    container: str | None = None
    task_per_rank: bool = False
    elements: int = 0
    site: Site = field(default_factory=Site)

    def check(self) -> None:
        """Raise ConfigError for what SLURM would refuse, or take and never start."""
        for flag, number in (("--nodes", self.nodes), ("--gpus-per-node", self.ranks_per_node)):
            if number < 1:
                raise ConfigError(f"{flag} {number} must be at least 1.")
        if self.time is not None:
            least_s = self.site.warning_s + 2 * SIGNAL_EARLY_S
            if _seconds(self.time) < least_s:
                raise ConfigError(
                    f"--time {self.time} leaves no time to train before the warning: ask for at least "
                    f"{least_s // 60 + 1} minutes, or lower warning_s={self.site.warning_s} in the site's file."
                )
        for flag, word in (("--partition", self.partition), ("--constraint", self.constraint)):
            if word is not None and (not word or re.search(r"[\s\"']", word)):
                raise ConfigError(f"{flag} {word!r} must be one word.")
        if self.container is not None and not (self.site.container.srun or self.site.container.command):
            raise ConfigError(
                f"--container {self.container} needs [container] in the site's file: see configs/site/example.toml."
            )
        for what, path in (("run.folder", self.run), ("the working directory", self.workdir)):
            found = UNFIT_FOR_PATHS.search(str(path))
            if found:
                raise ConfigError(
                    f"{what} {str(path)!r} has {found[0]!r}, which SLURM reads otherwise: choose another."
                )

    @property
    def name(self) -> str:
        """The job's name, one for each run's folder: of jobs with one name, SLURM runs one at a time."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.run.name)}-{crc32(str(self.run).encode()):08x}"

    def runs(self) -> list[Path]:
        """Return the folders of runs, one or those of an array's elements."""
        return [self.run / element_name(number) for number in range(self.elements)] or [self.run]

    def configs(self) -> list[Path]:
        """Return the configuration files of the runs."""
        names = [f"config_{element_name(number)}.toml" for number in range(self.elements)] or ["config.toml"]
        return [self.submitted / name for name in names]

    def script(self) -> str:
        """Return the batch script."""
        site = self.site
        rule = site.exclusion
        values = {
            "per": "for each rank" if self.task_per_rank else "on each node",
            "options": "\n".join(f"#SBATCH --{option}" for option in self._options()),
            "setup": "".join(f"    {line}\n" for line in self._setup()),
            "srun": shlex.join(["srun", "--kill-on-bad-exit=1", *self._in_container()]),
            "submitted": shlex.quote(str(self.submitted)),
            "run": shlex.quote(str(self.run)),
            "python": shlex.quote(site.container.python if self.container else str(self.python)),
            "nodes": self.nodes,
            "ranks_per_node": self.ranks_per_node,
            "threads": site.cpus_per_rank,
            "limits": shlex.join(
                [
                    f"--requeues={site.requeues}",
                    f"--max-failures={site.max_failures}",
                    f"--exclude-hours={rule.hours:g}",
                    f"--max-excluded={rule.most}",
                    *([f"--exclude={rule.always}"] if rule.always else []),
                ]
            ),
            "host_python": shlex.quote(str(self.python)),
            "first_port": FIRST_PORT,
            "num_ports": NUM_PORTS,
            "warned": EXIT_WARNED,
            "signal": WARNING_SIGNAL.name.removeprefix("SIG"),
        }
        text = SCRIPT.replace("@start@", TASK_PER_RANK if self.task_per_rank else TORCHRUN)
        text = text.replace("@names@", ELEMENT if self.elements else SINGLE)
        return re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text)

    def _options(self) -> list[str]:
        site = self.site
        tasks = self.ranks_per_node if self.task_per_rank else 1
        asked = {"time": self.time, "partition": self.partition, "constraint": self.constraint}
        return [
            f"job-name={self.name}",
            f"nodes={self.nodes}",
            f"ntasks-per-node={tasks}",
            f"cpus-per-task={site.cpus_per_rank * self.ranks_per_node // tasks}",
            *([site.gpus.replace("{count}", str(self.ranks_per_node))] if self.gpus else []),
            *(f"{option}={word}" for option, word in asked.items() if word is not None),
            *(option if value is True else f"{option}={_quoted(value)}" for option, value in site.sbatch.items()),
            f"chdir={_quoted(self.workdir)}",
            f"output={_quoted(self.run / ('%3a/logs/%A_%a.log' if self.elements else 'logs/%j.log'))}",
            *([f"array=0-{self.elements - 1}"] if self.elements else []),
            "open-mode=append",
            f"signal={WARNING_SIGNAL.name.removeprefix('SIG')}@{site.warning_s}",
            "requeue" if site.requeues else "no-requeue",
            "dependency=singleton",
        ]

    def _setup(self) -> list[str]:
        """Return what prepares the ranks; lines that others wrote may use variables that are not set."""
        variables = [f"export {name}={shlex.quote(str(value))}" for name, value in self.site.environment.items()]
        return [*(["set +u", *self.site.setup, "set -u"] if self.site.setup else []), *variables]

    def _in_container(self) -> list[str]:
        if self.container is None:
            return []
        words = (*self.site.container.srun, *self.site.container.command)
        return [word.replace("{image}", self.container) for word in words]


def element_name(number: int) -> str:
    """Return the folder's name of an array's element, as `%3a` in its job's output says."""
    return f"{number:03}"


def _seconds(time: str) -> int:
    """Return the length of a time limit as sbatch reads it."""
    match = TIME.fullmatch(time)
    if match is None:
        raise ConfigError(
            f"--time {time} is not a time limit: write minutes, hours:minutes:seconds or days-hours:minutes:seconds."
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        units = (3600, 60, 1)
        return int(match["days"]) * 86400 + sum(unit * part for unit, part in zip(units, parts, strict=False))
    units = ((60,), (60, 1), (3600, 60, 1))[len(parts) - 1]
    return sum(unit * part for unit, part in zip(units, parts, strict=True))


def _quoted(value: object) -> str:
    """Return a value for a #SBATCH line, which ends at a space unless quoted."""
    text = str(value)
    return f'"{text}"' if re.search(r"\s", text) else text


TORCHRUN = """\
    "$python" -m farspan.launch.torchrun --nnodes=@nodes@ --nproc-per-node=@ranks_per_node@ \\
        --rdzv-backend=c10d --rdzv-id="$job-$restarts" \\
        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --no-python bash "$submitted/job.sh" rank || status=$?
"""

TASK_PER_RANK = """\
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    bash "$submitted/job.sh" rank || status=$?
"""

SINGLE = """\
config=$submitted/config.toml
run=@run@
job=$SLURM_JOB_ID
"""

ELEMENT = """\
# Each element of the array is a run of its own.
element=$(printf %03d "$SLURM_ARRAY_TASK_ID")
config=$submitted/config_$element.toml
run=@run@/$element
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
"""

SCRIPT = """\
#!/bin/bash
@options@

# Made by `farspan launch slurm`; sbatch takes this file by hand too. Jobs of one run have one name and, being
# singletons, wait for each other: submit it several times to go on after the time limit.
#
# It has three parts. `job` runs once, on the first node, and starts a `task` @per@.
# A task starts its ranks, each of them as a `rank`.
set -euo pipefail

# What runs is the code and the configuration of when the job was submitted.
submitted=@submitted@
@names@restarts=${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$job/$restarts
python=@python@

# Before the ranks start: whether the job was started too often or fails in a row. After their end: what failed and
# where, and whether the job is queued again, and without which nodes.
requeue() {
    @host_python@ -m farspan.launch.slurm.requeue "$@" \\
        --run="$run" --job="$job" --restarts="$restarts" --script="$submitted/job.sh" \\
        @limits@
}

case ${1:-job} in
job)
    mkdir -p "$logs/ended"
    scontrol show hostnames "$SLURM_JOB_NODELIST" >"$logs/nodes"
    export OMP_NUM_THREADS=@threads@ PYTHONUNBUFFERED=1
    # Without the second, Python would prefer code that lies in the current folder.
    export PYTHONPATH=$submitted/code PYTHONSAFEPATH=1
@setup@\
    requeue before || exit
    # srun does not take this over from sbatch.
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # Ranks meet on the first node, at a port that other jobs there do not have.
    read -r MASTER_ADDR <"$logs/nodes"
    export MASTER_ADDR MASTER_PORT=$((@first_port@ + SLURM_JOB_ID % @num_ports@))
    # SLURM sends SIGTERM to every process when it ends the job: ranks save, and this shell waits for them.
    told=
    trap 'told=--told' TERM
    status=0
    @srun@ bash "$submitted/job.sh" task || status=$?
    # To queue the job again ends this shell.
    trap '' TERM
    requeue after --status="$status" $told
    ;;
task)
    # SLURM's warning reaches every process: the ranks act on it, and nothing else may die of it.
    trap '' @signal@
    trap : TERM
    status=0
@start@\
    echo "$SLURMD_NODENAME $HOSTNAME $status" >"$logs/ended/$SLURM_PROCID"
    # Ranks that saved after a warning: to srun that would be a failure, for which it kills those of other nodes.
    [ "$status" != @warned@ ] || status=0
    exit "$status"
    ;;
rank)
    # Ranks catch signals themselves; what writes their logs ends when they do.
    trap '' INT TERM
    # Output goes to a file of the rank and, with the rank before each line, into the log of the job.
    "$python" -m farspan.launch.cli train "$config" 2>&1 |
        tee -a "$logs/rank_$RANK.log" | sed -u "s/^/$RANK: /"
    ;;
esac
"""

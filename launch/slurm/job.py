"""A run as a SLURM job: its resources and its batch script, job.sh behind a header."""

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from farspan.errors import ConfigError
from farspan.launch.slurm.site import SIGNAL_EARLY_S, Site
from farspan.trainer.resilience.signals import EXIT_WARNED, WARNING_SIGNAL

BODY = Path(__file__).with_name("job.sh")
SITE_MARK = "    # @site@\n"
HEADER = """\
# Made by `farspan launch slurm`; it can also be submitted by hand. Jobs of one run share a name and, as singletons,
# wait for each other: submit the script several times to continue after the time limit.
"""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
NOT_IN_PATHS = re.compile(r"[^\w./,+=:@~ -]")
"""SLURM expands some of these, such as %, and #SBATCH lines have their own rules for quotes."""


def element_name(number: int) -> str:
    """Return the name of the folder of an array's element; sbatch's `%3a` is the same."""
    return f"{number:03}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """`nodes` times `ranks_per_node` processes that run `farspan train`.

    run: the run's folder. submitted: the folder in it with this script, the configuration and the code that the job
    runs. workdir: the base of relative paths in the configuration. python: the interpreter. gpus: whether each rank
    gets a GPU. time: as sbatch takes it. container: an image. task_per_rank: SLURM starts the ranks, not torchrun.
    elements: the size of a job array, whose elements are runs in numbered folders of `run`; 0 for a single run.
    at_most: how many of them run at a time, None for all.
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
    at_most: int | None = None
    site: Site = field(default_factory=Site)

    def check(self) -> None:
        """Raise ConfigError for a job that SLURM would refuse, or accept and never start."""
        counts = {"--nodes": self.nodes, "--gpus-per-node": self.ranks_per_node, "--at-most": self.at_most}
        for flag, number in counts.items():
            if number is not None and number < 1:
                raise ConfigError(f"{flag} {number} must be at least 1.")
        if self.at_most is not None and not self.elements:
            raise ConfigError(f"--at-most {self.at_most} limits the runs of --each: give both, or neither.")
        if self.time is not None:
            least_s = self.site.warning_s + 2 * SIGNAL_EARLY_S
            if seconds(self.time) < least_s:
                raise ConfigError(
                    f"--time {self.time} leaves no time to train before the warning: ask for at least "
                    f"{math.ceil(least_s / 60)} minutes, or lower warning_s={self.site.warning_s} in the site's file."
                )
        for flag, word in (("--partition", self.partition), ("--constraint", self.constraint)):
            if word is not None and (not word or re.search(r"[\s\"']", word)):
                raise ConfigError(f"{flag} {word!r} must be one word.")
        if self.container is not None and not (self.site.container.srun or self.site.container.command):
            raise ConfigError(
                f"--container {self.container} needs [container] in the site's file: see configs/site/example.toml."
            )
        for name, path in (("run.folder", self.run), ("the working directory", self.workdir)):
            found = NOT_IN_PATHS.search(str(path))
            if found:
                raise ConfigError(f"{name} {str(path)!r} has {found[0]!r}, which SLURM misreads: choose another path.")

    @property
    def name(self) -> str:
        """The job's name, unique to the run's folder: SLURM runs singletons of one name one at a time."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', self.run.name)}-{crc32(str(self.run).encode()):08x}"

    def describe(self, chain: int) -> str:
        """Return what is submitted `chain` times, and which resources nobody has chosen, as a table."""
        nodes = f"{self.nodes} {'node' if self.nodes == 1 else 'nodes'}"
        lines = [f"jobs        {chain}, on {nodes}"]
        if self.elements:
            limit = "all at once if there is room; --at-most N limits that"
            limit = limit if self.at_most is None else f"at most {self.at_most} at a time"
            lines = [f"jobs        {chain * self.elements}, each on {nodes}: an array of {self.elements} runs, {limit}"]
        if chain > 1:
            lines[0] += f"; the script is submitted {chain} times, and each job goes on where the one before it ended"
        unsaid = [] if self.site.cpus_per_rank > 1 else ["1 core per rank: set cpus_per_rank"]
        if not self.site.sbatch.keys() & {"mem", "mem-per-cpu", "mem-per-gpu"}:
            unsaid.append("the cluster's default memory: set mem in [sbatch]")
        if unsaid:
            lines.append(f"resources   {'; '.join(unsaid)}; in the site's file, see configs/site/example.toml")
        return "\n".join(lines)

    def runs(self) -> list[Path]:
        """Return the folders of the runs: one, or one for each element of an array."""
        return [self.run / element_name(number) for number in range(self.elements)] or [self.run]

    def configs(self) -> list[Path]:
        names = [f"config_{element_name(number)}.toml" for number in range(self.elements)] or ["config.toml"]
        return [self.submitted / name for name in names]

    def script(self) -> str:
        """Return the batch script: #SBATCH lines, variables, and job.sh, in which the site's lines take their place."""
        body = BODY.read_text().partition("\n\n")[2]
        options = "".join(
            f"#SBATCH --{option}\n" if value is True else f"#SBATCH --{option}={_quoted(value)}\n"
            for option, value in self.options().items()
        )
        variables = "".join(f"{name}={value}\n" for name, value in self._variables().items())
        site_lines = "".join(f"    {line}\n" for line in self._site_lines())
        return f"#!/bin/bash\n{options}\n{HEADER}{variables}\n{body.replace(SITE_MARK, site_lines)}"

    def options(self) -> dict[str, object]:
        """Return sbatch's long options with their values, True for one without a value."""
        site = self.site
        tasks = self.ranks_per_node if self.task_per_rank else 1
        throttle = "" if self.at_most is None else f"%{self.at_most}"
        requested = {"time": self.time, "partition": self.partition, "constraint": self.constraint}
        gpus, _, count = site.gpus.replace("{count}", str(self.ranks_per_node)).partition("=")
        return {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": tasks,
            "cpus-per-task": site.cpus_per_rank * self.ranks_per_node // tasks,
            **({gpus: count or True} if self.gpus else {}),
            **{option: word for option, word in requested.items() if word is not None},
            **site.sbatch,
            "chdir": self.workdir,
            "output": self.run / ("%3a/logs/%A_%a.log" if self.elements else "logs/%j.log"),
            **({"array": f"0-{self.elements - 1}{throttle}"} if self.elements else {}),
            "open-mode": "append",
            "signal": f"{WARNING_SIGNAL.name.removeprefix('SIG')}@{site.warning_s}",
            "requeue" if site.requeues else "no-requeue": True,
            "dependency": "singleton",
        }

    def _variables(self) -> dict[str, str]:
        """Return the shell variables that job.sh uses, with their quoted values."""
        site = self.site
        limits = {
            "requeues": site.requeues,
            "max-failures": site.max_failures,
            "exclude-hours": f"{site.exclude_hours:g}",
            "max-excluded": site.max_excluded,
            **({"exclude": site.exclusion.always} if site.exclusion.always else {}),
        }
        return {
            "submitted": shlex.quote(str(self.submitted)),
            "run": shlex.quote(str(self.run)),
            "is_array": "true" if self.elements else "false",
            "task_per_rank": "true" if self.task_per_rank else "false",
            "num_nodes": str(self.nodes),
            "ranks_per_node": str(self.ranks_per_node),
            "threads_per_rank": str(site.cpus_per_rank),
            "host_python": shlex.quote(str(self.python)),
            # In a container, the ranks have its interpreter.
            "python": shlex.quote(site.container.python if self.container else str(self.python)),
            "srun": f"({shlex.join(['srun', '--kill-on-bad-exit=1', *self._in_container()])})",
            "requeue_limits": f"({shlex.join(f'--{name}={value}' for name, value in limits.items())})",
            "exit_warned": str(EXIT_WARNED),
            "warning_signal": WARNING_SIGNAL.name.removeprefix("SIG"),
        }

    def _site_lines(self) -> list[str]:
        variables = [f"export {name}={shlex.quote(str(value))}" for name, value in self.site.environment.items()]
        # A site's own lines may use variables that are not set.
        return [*(["set +u", *self.site.setup, "set -u"] if self.site.setup else []), *variables]

    def _in_container(self) -> list[str]:
        if self.container is None:
            return []
        words = (*self.site.container.srun, *self.site.container.command)
        return [word.replace("{image}", self.container) for word in words]


def seconds(time: str) -> int:
    """Return the length of a time limit as sbatch reads it."""
    match = TIME.fullmatch(time)
    if match is None:
        raise ConfigError(
            f"--time {time} is not a time limit: write minutes, hours:minutes:seconds or days-hours:minutes:seconds."
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        # After days, the first number is hours: 1-12 is a day and a half.
        factors = (3600, 60, 1)
        return int(match["days"]) * 86400 + sum(f * part for f, part in zip(factors, parts, strict=False))
    # Without days, a single number is minutes.
    factors = ((60,), (60, 1), (3600, 60, 1))[len(parts) - 1]
    return sum(f * part for f, part in zip(factors, parts, strict=True))


def _quoted(value: object) -> str:
    """Return a value for a #SBATCH line, which ends at a space unless quoted."""
    text = str(value)
    return f'"{text}"' if re.search(r"\s", text) else text

"""The batch script: as on file, word for word; refused jobs."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.launch.slurm.job import BODY, SITE_MARK, SlurmJob
from farspan.launch.slurm.site import Container, Site

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "golden"
# The one in the virtual environment, which need not be on the path.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
JOB = SlurmJob(
    run=Path("/scratch/runs/long"),
    submitted=Path("/scratch/runs/long/submitted/001"),
    workdir=Path("/home/me/farspan"),
    python=Path("/home/me/farspan/.venv/bin/python"),
    nodes=2,
    ranks_per_node=8,
    gpus=True,
)
SITE = Site(
    sbatch={"account": "my_project", "exclusive": True, "comment": "two words"},
    gpus="gres=gpu:{count}",
    cpus_per_rank=6,
    environment={"NCCL_SOCKET_IFNAME": "ib0", "TEXT": "it's"},
    setup=("module load cuda",),
    warning_s=120,
    requeues=3,
    container=Container(srun=("--container-image={image}",), command=("nice", "-n", "5"), python="python3"),
)
SITE_LINES = """\
    set +u
    module load cuda
    set -u
    export NCCL_SOCKET_IFNAME=ib0
    export TEXT='it'"'"'s'
"""
JOBS = {
    "torchrun.sh": JOB,
    "tasks.sh": replace(
        JOB, task_per_rank=True, time="2-00", partition="long", constraint="a&b", container="my image.sqsh", site=SITE
    ),
    "array.sh": replace(JOB, elements=3),
}


@pytest.mark.parametrize("name", list(JOBS))
def test_the_script_is_the_header_on_file_and_the_body(name: str) -> None:
    """After an intended change, look at the difference and write the file again."""
    job = JOBS[name]
    header = (GOLDEN / name).read_text()
    head, tail = BODY.read_text().partition("\n\n")[2].split(SITE_MARK)
    script = job.script()
    assert script.startswith(f"{header}\n{head}")
    assert script.endswith(tail)
    assert script[len(f"{header}\n{head}") : -len(tail)] == (SITE_LINES if job.site is SITE else "")
    assert "#SBATCH" not in script[script.index("\nset -euo") :], "sbatch reads none after the first command"


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    for name, job in JOBS.items():
        (tmp_path / name).write_text(job.script())
    scripts = [BODY, ROOT / "tests/slurm/cluster.sh", *(tmp_path / name for name in JOBS)]
    done = subprocess.run([str(SHELLCHECK), *map(str, scripts)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_run_on_cpus_asks_for_no_gpus() -> None:
    assert "gpu" not in replace(JOB, gpus=False).script()


def test_slurm_knows_that_a_job_must_not_be_requeued() -> None:
    """Otherwise SLURM would start it again after a preemption, for nothing."""
    assert "#SBATCH --no-requeue\n" in replace(JOB, site=Site(requeues=0)).script()


def test_what_is_submitted_is_said() -> None:
    assert JOB.describe(1).splitlines()[0] == "jobs        1, on 2 nodes"
    assert JOB.describe(3).startswith("jobs        3, on 2 nodes; the script is submitted 3 times")
    array = replace(JOB, elements=50, nodes=1, site=replace(SITE, sbatch={"mem": "0"}))
    for option in ("mem", "mem-per-cpu", "mem-per-gpu"):
        (line,) = replace(array, site=replace(SITE, sbatch={option: "0"})).describe(2).splitlines()
        assert line.startswith(
            "jobs        100, each on 1 node: an array of 50 runs, all at once if there is room; --at-most"
        )
    assert "#SBATCH --array=0-49%4\n" in replace(array, at_most=4).script()
    assert "at most 4 at a time" in replace(array, at_most=4).describe(1)
    for site in (Site(), SITE, Site(cpus_per_rank=2)):
        resources = replace(JOB, site=site).describe(1).splitlines()[1]
        assert "default memory" in resources
        assert ("1 core per rank" in resources) == (site.cpus_per_rank == 1)


def test_jobs_of_one_run_share_a_name_that_others_do_not_have() -> None:
    assert JOB.name == replace(JOB, nodes=9, submitted=JOB.run / "submitted/002").name
    assert JOB.name != replace(JOB, run=Path("/scratch/other/long")).name
    assert re.fullmatch(r"a_b-[0-9a-f]{8}", replace(JOB, run=Path("/a b")).name)


REFUSALS: list[tuple[dict[str, object], str]] = [
    ({"nodes": 0}, "--nodes 0 must be at least 1."),
    ({"ranks_per_node": -1}, "--gpus-per-node -1 must be at least 1."),
    ({"elements": 3, "at_most": 0}, "--at-most 0 must be at least 1."),
    ({"at_most": 2}, "--at-most 2 limits the runs of --each"),
    ({"time": "soon"}, "--time soon is not a time limit"),
    ({"time": "1:2:3:4"}, "--time 1:2:3:4 is not a time limit"),
    ({"time": ""}, "--time  is not a time limit"),
    ({"time": "6"}, "at least 7 minutes, or lower warning_s=300"),
    ({"time": "6:59"}, "--time 6:59 leaves no time"),
    ({"partition": "a b"}, "--partition 'a b' must be one word."),
    ({"constraint": ""}, "--constraint '' must be one word."),
    ({"container": "image"}, "--container image needs [container] in the site's file"),
    ({"run": Path("/runs/100%")}, "run.folder '/runs/100%' has '%'"),
    ({"workdir": Path('/a"b')}, "the working directory '/a\"b' has '\"'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[message[:24] for _, message in REFUSALS])
def test_jobs_that_slurm_would_refuse_or_never_start_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(JOB, **changes).check()  # pyright: ignore[reportArgumentType]
    assert message in str(refused.value)


@pytest.mark.parametrize("time", ["7", "7:00", "0:7:00", "1-0", "1-0:0", "0-0:7:0", "30:00:00", "100000"])
def test_time_limits_as_sbatch_takes_them(time: str) -> None:
    replace(JOB, time=time).check()

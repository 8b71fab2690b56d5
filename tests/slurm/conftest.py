"""One real SLURM cluster for all tests of this folder: three virtual nodes of two CPUs, see cluster.sh."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.support.processes import DEADLINE_S, find, send, wait_for

ROOT = Path(__file__).resolve().parents[2]
NODES, CPUS_PER_NODE = 3, 2
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
PACKAGES = "slurmctld slurmd slurm-client munge"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A running cluster. pid: the first process of its head node. commands: its standard input."""

    folder: Path
    pid: int
    commands: IO[str]

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on the head node, from the current folder, and return what it printed."""
        # Entering a mount namespace changes the current folder to /.
        entered = ["nsenter", "-t", str(self.pid), "-a", f"--wd={Path.cwd()}", *command]
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            entered, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_S
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def sbatch(self, *options: str) -> str:
        """Submit a job and return its id."""
        return self.run(["sbatch", "--parsable", *options]).stdout.strip()

    def kill_daemon(self, node: str) -> None:
        """Kill a node's slurmd; the processes that it has started live on."""
        send(signal.SIGKILL, find("slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf"))

    def power_off(self, node: str) -> None:
        """Kill all processes of a node, with its network."""
        script = str(Path(__file__).with_name("cluster.sh"))
        send(signal.SIGKILL, find("bash", script, "node", str(self.folder), node))

    def power_on(self, node: str) -> None:
        """Start a node again and wait until SLURM can use it."""
        self.commands.write(f"{node}\n")
        self.commands.flush()
        idle = ["sinfo", "-h", "-N", "-n", node, "-t", "idle", "-o", "%N"]
        wait_for(lambda: node in self.run(idle).stdout, f"{node} is idle")

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING, also after its end."""
        return self.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]).stdout.strip()

    def await_state(self, job: str, *states: str) -> None:
        """Wait until a job is in one of `states`."""
        deadline = time.monotonic() + DEADLINE_S
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.2)


def missing() -> str | None:
    """Return what the cluster needs but this machine lacks."""
    if os.geteuid() != 0:
        return "root, for virtual nodes"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}: on Debian and Ubuntu, apt-get install --no-install-recommends {PACKAGES}"
    network = "ip link add br0 type bridge && ip link add v1 type veth peer name v2 && mount -t tmpfs none /mnt"
    spaces = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c", network]
    if subprocess.run(spaces).returncode:
        return "namespaces with networks and mounts of their own"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder if the machine cannot run a cluster; as marks they are one line of the report."""
    items = [item for item in items if item.path.parent == Path(__file__).parent]
    lacking = missing() if items else None
    if lacking is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"a SLURM cluster on this machine needs {lacking}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start the cluster before the first test that needs it."""
    # Not pytest's own folders: others must be able to enter it, and the path of a socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    command = ["bash", str(Path(__file__).with_name("cluster.sh")), str(folder), str(NODES), str(CPUS_PER_NODE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "ready\n", f"the cluster did not start, see {folder}"
            pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            yield Cluster(folder=folder, pid=pid, commands=process.stdin)
        finally:
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)

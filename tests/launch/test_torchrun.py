import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from farspan.launch.torchrun import _first_failure, _report
from farspan.trainer.resilience.signals import EXIT_WARNED, INTERRUPTED
from tests.support.processes import DEADLINE_S, wait_for


@pytest.mark.parametrize(
    ("status", "passed_on", "report"),
    [
        (1, 1, "failed with exit status 1"),
        (-11, 139, "was killed by SIGSEGV"),
        (137, 137, "was killed by SIGKILL (the system does that when memory runs out)"),
        (2, 2, None),
        (75, 75, None),
        (76, 76, None),
        (77, 77, None),
    ],
)
def test_a_failure_is_one_sentence(
    capsys: pytest.CaptureFixture[str], status: int, passed_on: int, report: str | None
) -> None:
    assert _report(3, status) == passed_on
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 0 if report is None else 1)
    assert report is None or err.startswith(f"farspan: rank 3 {report}")


def test_a_rank_that_was_killed_failed_before_those_that_lost_it() -> None:
    def failure(status: int, timestamp: int) -> ProcessFailure:
        found = ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file="")
        found.timestamp = timestamp
        return found

    lost, killed, other = failure(1, 100), failure(137, 102), failure(1, 99)
    assert _first_failure({2: lost, 3: killed}) == (3, 137)
    assert _first_failure({2: lost, 3: failure(-9, 102)}) == (3, -9)
    assert _first_failure({2: lost, 4: other}) == (4, 1)
    # torchrun itself ends the others: by SIGTERM, and where that is not enough by SIGKILL.
    assert _first_failure({2: lost, 4: failure(-15, 100), 5: failure(-9, 130)}) == (2, 1)


@pytest.mark.parametrize(("job", "status"), [(None, 2), ("17", 1)])
def test_a_port_in_use_is_one_sentence(job: str | None, status: int) -> None:
    """A scheduler may start the run again, with another port."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        program = ["-m", "farspan.launch.torchrun", "--nproc-per-node=1", "--master-port", port, "unused.py"]
        environment = {**os.environ, **({"SLURM_JOB_ID": job} if job else {})}
        done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1)
    assert done.stderr.startswith("farspan: the ranks cannot meet (")
    assert f"port: {port}" in done.stderr


RANK = """
import os, sys, time
from pathlib import Path
from farspan.trainer.resilience.signals import EXIT_WARNED, INTERRUPTED, StopSignal
folder = Path(sys.argv[1])
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "pid")
while not (folder / "sent").exists():
    time.sleep(0.01)
with StopSignal(first=lambda number: None) as stop:
    sys.exit(EXIT_WARNED if stop.preemption_warning else 0 if stop.requested else 1)
"""


@pytest.mark.parametrize("by_slurm", [True, False])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, EXIT_WARNED), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_signal_before_a_rank_can_act_on_it_stays_pending(
    tmp_path: Path, number: signal.Signals, status: int, by_slurm: bool
) -> None:
    """SLURM sends it to torchrun, started by a shell that ignores it, and to the rank; a terminal to torchrun alone."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "farspan.launch.torchrun", "--standalone", "--nproc-per-node", "1"]
    command = ["bash", "-c", "trap '' USR1; exec \"$@\"", "_", *torchrun, str(tmp_path / "rank.py"), str(tmp_path)]
    environment = os.environ | ({"FARSPAN_LAUNCHER": str(os.getpid())} if by_slurm else {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            wait_for((tmp_path / "pid").exists, "the start of the rank")
            process.send_signal(number)
            if by_slurm:
                os.kill(int((tmp_path / "pid").read_text()), number)
            else:
                assert process.stderr is not None
                assert (process.stderr.readline(), process.stderr.readline()[:8]) == ("\n", "stopping")
                time.sleep(0.1)
            (tmp_path / "sent").touch()
            error = process.communicate(timeout=DEADLINE_S)[1]
            assert (process.returncode, error) == (status, "")
        finally:
            process.kill()


def test_a_signal_before_there_are_ranks_ends_torchrun() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "farspan.launch.torchrun", "--nnodes=2", "--nproc-per-node=1", "unused.py"]
    torchrun[3:3] = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"]
    with subprocess.Popen(torchrun, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: not connect(endpoint), "a node that waits for the other")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == INTERRUPTED
        finally:
            process.kill()


def connect(endpoint: str) -> int:
    host, _, port = endpoint.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port)))

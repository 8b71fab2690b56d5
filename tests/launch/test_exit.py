"""The end of a rank's process: whatever threads of torch are still doing, it has the status of its command."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import DEADLINE_S

# Puts off each lock that a thread of gloo takes, by DELAY_MS once `delaying` is set: so the thread still has its last
# tensor when the main thread has left the process group.
DELAY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
int delaying = 0;
int pthread_mutex_lock(pthread_mutex_t *mutex) {
    static int (*lock)(pthread_mutex_t *);
    char name[16] = "";
    if (!lock) lock = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (delaying) pthread_getname_np(pthread_self(), name, sizeof name);
    if (strstr(name, "gloo")) nanosleep(&(struct timespec){0, 1000000L * atoi(getenv("DELAY_MS"))}, 0);
    return lock(mutex);
}
"""
RANK = """
import ctypes, os, sys
import torch, torch.distributed as dist
from farspan.launch import cli

def main():
    store = "file://" + os.path.abspath("store")
    dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
    global group  # outlives the default group, as those of a DeviceMesh do
    group = dist.new_group([0, 1])
    ctypes.c_int.in_dll(ctypes.CDLL(None), "delaying").value = 1
    dist.broadcast(torch.ones(4), 0, group=group)
    dist.destroy_process_group()
    return 75

cli.main = main
cli.run_and_exit()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("delay_ms", [10, 20, 30])
def test_threads_of_gloo_do_not_abort_a_rank_that_has_ended(tmp_path: Path, delay_ms: int) -> None:
    library = tmp_path / "delay.so"
    (tmp_path / "delay.c").write_text(DELAY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "delay.c", "-ldl"], cwd=tmp_path, check=True)
    environment = {
        **os.environ, "LD_PRELOAD": str(library), "DELAY_MS": str(delay_ms), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, "train", str(rank)], cwd=tmp_path, env=environment)
        for rank in range(2)
    ]
    assert [process.wait(DEADLINE_S) for process in ranks] == [75, 75]


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("return 75", 75, ""),
        ("sys.exit(2)", 2, ""),
        ("raise ValueError('here')", 1, "ValueError: here"),
        ("print('last words', end=''); return 0", 0, ""),
    ],
)
def test_a_rank_ends_before_python_is_finalized(body: str, status: int, errors: str) -> None:
    program = (
        "import atexit, sys\n"
        "from farspan.launch import cli\n"
        "class Late:\n    def __del__(self): print('finalized', file=sys.stderr)\n"
        "late = Late()\n"
        "atexit.register(print, 'exit functions', end='')\n"
        f"def main():\n    {body}\n"
        "cli.main = main\n"
        "cli.run_and_exit()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "train"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, f"{'last words' if 'words' in body else ''}exit functions")
    assert errors in done.stderr
    assert "finalized" not in done.stderr


SIGNALED = """
import argparse, os
from farspan.launch import cli
from farspan.trainer.resilience.signals import StopSignal

def get_signal():
    os.kill(os.getpid(), {number})
    for _ in range(1000): pass

def parse(arguments):
    try:
        {in_parse} and get_signal()
    except BaseException:  # as imports do
        pass
    return argparse.Namespace(command=command)

def command(options):
    with StopSignal():
        pass
    {in_parse} or get_signal()
    return 75

cli.parse = parse
cli.run_and_exit()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("command", "in_parse", "status"), [("train", False, 75), ("launch", False, 130), ("launch", True, 130)]
)
def test_a_signal_outside_training_leaves_a_status(
    command: str, in_parse: bool, status: int, number: signal.Signals
) -> None:
    """A rank that has ended keeps its status; another command ends as it does by Ctrl-C."""
    program = [sys.executable, "-c", SIGNALED.format(number=int(number), in_parse=in_parse), command]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")

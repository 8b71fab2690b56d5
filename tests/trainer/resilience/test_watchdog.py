"""Hangs of real processes: each leaves its stacks and ends by itself, whatever it hangs in."""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer import train as train_module
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import CheckpointConfig, EvaluateConfig
from farspan.trainer.evaluate import Validation
from farspan.trainer.resilience import watchdog as module
from farspan.trainer.resilience.signals import EXIT_HUNG, StopSignal
from farspan.trainer.resilience.watchdog import Watchdog, WatchdogConfig
from tests.support import tiny
from tests.support.processes import DEADLINE_S
from tests.support.rank_pool import PRELOAD

WAIT_S = DEADLINE_S


def start(work: Callable[..., None], folder: Path, *arguments: object) -> Any:
    """Start a process whose standard error goes to FOLDER/errors_ARGUMENTS."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    process = context.Process(target=_with_own_errors, args=(work, folder, arguments), daemon=True)
    process.start()
    return process


def _with_own_errors(work: Callable[..., None], folder: Path, arguments: tuple[object, ...]) -> None:
    file = os.open(folder / f"errors_{'_'.join(map(str, arguments))}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    module.GRACE_S = 1.0
    work(folder, *arguments)


def exit_status(process: Any) -> int | None:
    process.join(WAIT_S)
    status = process.exitcode
    process.kill()
    return status


def sleep_in_c(seconds: float) -> None:
    time.sleep(seconds)


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def hold_the_lock(seconds: float) -> None:
    """C code that does not let Python go on in other threads."""
    ctypes.PyDLL(None).sleep(int(seconds))


HANGS = {function.__name__: function for function in (sleep_in_c, busy, hold_the_lock)}


def hang_in_a_step(folder: Path, hang: str) -> None:
    watchdog = Watchdog(WatchdogConfig(step_s=0.3), folder / "stacks", rank=3)
    with watchdog.phase("step", 11):
        pass
    with watchdog.phase("step", 12):
        HANGS[hang](WAIT_S)


def sleep_after_a_step(folder: Path) -> None:
    with Watchdog(WatchdogConfig(step_s=0.3), folder / "stacks", rank=3).phase("step", 11):
        pass
    time.sleep(0.3 + 3 * module.GRACE_S + 0.5)


def test_a_phase_that_has_ended_leaves_no_clock_running(tmp_path: Path) -> None:
    assert exit_status(start(sleep_after_a_step, tmp_path)) == 0
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("hang", ["sleep_in_c", "busy"])
def test_a_phase_that_does_not_end_leaves_its_stacks(tmp_path: Path, hang: str) -> None:
    written = tmp_path / "stacks" / "step_00000012" / f"rank_3_{socket.gethostname()}.txt"
    written.parent.mkdir(parents=True)
    # A run that starts again may hang at the same step.
    written.write_text("an earlier hang\n")
    assert exit_status(start(hang_in_a_step, tmp_path, hang)) == EXIT_HUNG
    text = written.read_text()
    assert re.match(
        r"an earlier hang\nrank 3 hangs: step at step 12 did not end within watchdog\.step_s=0\.3; process \d+, ", text
    )
    # The main thread's, and that of the watchdog itself.
    assert f"in {hang}\n" in text
    assert "in _expire\n" in text
    errors = (tmp_path / f"errors_{hang}").read_text()
    what = "farspan: rank 3 hangs: step at step 12 did not end within watchdog.step_s=0.3; "
    assert errors == f"{what}stacks are in {written.parent}/.\n"


def test_code_that_keeps_python_from_running_is_ended_too(tmp_path: Path) -> None:
    assert exit_status(start(hang_in_a_step, tmp_path, "hold_the_lock")) == 1
    assert "in hold_the_lock\n" in (tmp_path / "errors_hold_the_lock").read_text()


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file in the way")
    assert exit_status(start(hang_in_a_step, tmp_path, "busy")) == EXIT_HUNG
    assert "in busy\n" in (tmp_path / "errors_busy").read_text()


def go_on_for_long(folder: Path) -> None:
    watchdog = Watchdog(WatchdogConfig(step_s=1.0, evaluation_s=1.0, save_s=0), folder / "stacks", rank=0)
    with watchdog.phase("save", 3):
        time.sleep(1.2)
    for step in range(6):
        with watchdog.phase("step", step):
            time.sleep(0.25)
    with watchdog.phase("evaluation", 3):
        for _ in range(6):
            watchdog.restart()
            time.sleep(0.25)
    # Between phases there is no limit.
    time.sleep(1.2)


def test_phases_that_end_in_time_and_those_without_a_limit_are_not_ended(tmp_path: Path) -> None:
    assert exit_status(start(go_on_for_long, tmp_path)) == 0
    assert not (tmp_path / "stacks").exists()


def wait_for_a_rank_that_never_comes(folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="2")
    config = tiny.config(folder / "tokens", folder / "run", ParallelConfig(context=2))
    config = replace(config, watchdog=WatchdogConfig(start_s=3.0))
    train_module.train(config, Ranks(rank=0, world_size=2), StopSignal())


def test_a_start_that_does_not_end_is_ended(tmp_path: Path) -> None:
    assert exit_status(start(wait_for_a_rank_that_never_comes, tmp_path, free_port())) == EXIT_HUNG
    (written,) = (tmp_path / "run" / "stacks" / "start_00000000").glob("*.txt")
    assert "in connected\n" in written.read_text()


def train_with_one_that_stops(folder: Path, rank: int, port: int, phase: str) -> None:
    """As a rank of a run of two steps: rank 1 is stopped in the second one, or in the phase after."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    config = tiny.config(folder / "tokens", folder / "run", ParallelConfig(context=2), steps=2)
    # The first step takes longest, on a busy machine seconds.
    limit = 10.0 if phase == "step" else 2.0
    config = replace(
        config, watchdog=WatchdogConfig(**{f"{phase}_s": limit}), optimizer=replace(config.optimizer, warmup_steps=0)
    )
    if rank == 1:
        owner, name = {
            "step": (train_module, "update"),
            "evaluation": (Validation, "run"),
            "save": (Checkpointer, "start_saving"),
        }[phase]
        function, calls = getattr(owner, name), []

        def stopping(*arguments: object) -> object:
            calls.append(1)
            if phase != "step" or len(calls) == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return function(*arguments)

        setattr(owner, name, stopping)
    train_module.train(config, Ranks(rank=rank, world_size=2), StopSignal())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("phase", ["step", "evaluation", "save"])
def test_ranks_that_wait_for_one_that_is_stopped_end(tmp_path: Path, phase: str) -> None:
    tiny.make_data(tmp_path)
    port = free_port()
    processes = [start(train_with_one_that_stops, tmp_path, rank, port, phase) for rank in range(2)]
    try:
        assert exit_status(processes[0]) == EXIT_HUNG
        assert processes[1].is_alive()
    finally:
        # It is stopped still; to be killed needs no cooperation.
        processes[1].kill()
        processes[1].join(WAIT_S)
    assert processes[1].exitcode == -signal.SIGKILL
    stacks = tmp_path / "run" / "stacks"
    assert [path.name for path in stacks.iterdir()] == [f"{phase}_00000002"]
    (written,) = (stacks / f"{phase}_00000002").glob("*.txt")
    assert "in train\n" in written.read_text()


def test_every_wait_for_other_ranks_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two phases: ranks that wait there for one that hangs would wait for parallel.timeout_s."""
    inside, outside = [], []

    @contextmanager
    def phase(watchdog: Watchdog, name: str, step: int) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            # A save in the background is waited for in the next one, or at the end.
            if not inside and threading.current_thread() is threading.main_thread():
                outside.append("".join(traceback.format_stack(limit=4)[:-1]))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(Watchdog, "phase", phase)
    monkeypatch.setattr(Watchdog, "restart", lambda watchdog: None)
    for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather", "all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, recorded(name, getattr(dist, name)))
    config = tiny.config(tiny.make_data(tmp_path), tmp_path / "run", ParallelConfig(), steps=2)
    config = replace(
        config,
        checkpoint=CheckpointConfig(every_steps=1),
        evaluate=EvaluateConfig(every_steps=1, sequences=2),
        optimizer=replace(config.optimizer, warmup_steps=1),
    )
    for steps in (2, 2, 3):  # a first start, one with nothing to do, one that resumes
        train_module.train(replace(config, train=replace(config.train, steps=steps)), Ranks(), StopSignal())
    assert outside == []

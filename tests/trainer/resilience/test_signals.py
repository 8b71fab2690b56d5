"""Stop requests by real signals to a real process."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from farspan.trainer.resilience.signals import StopSignal, stop_signals_blocked
from tests.support.processes import DEADLINE_S

PROGRAM = """
import sys, time
from farspan.trainer.resilience import signals
signals.SAME_REQUEST_S = {same_request_s}
{before}
with signals.StopSignal() as stop:
    print("ready", flush=True)
    give_up_at = time.monotonic() + {deadline_s}
    while not stop.requested and time.monotonic() < give_up_at:
        time.sleep(0.01)
    print("asked" if stop.requested else "gave up", flush=True)
    for line in sys.stdin:
        print("goes on", flush=True)
print("ended well", flush=True)
"""


@contextmanager
def program(*, same_request_s: float = 60, before: str = "") -> Iterator[subprocess.Popen[str]]:
    text = PROGRAM.format(same_request_s=same_request_s, before=before, deadline_s=DEADLINE_S)
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_one_request_lets_the_process_end_well(number: signal.Signals) -> None:
    with program() as process:
        assert hear(process) == "ready"
        process.send_signal(number)
        assert hear(process) == "asked"
        # The terminal and torchrun both deliver it: still one request.
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate("\n")
        assert out == "goes on\nended well\n"
        assert err == "\nstopping    after this step, with a checkpoint; Ctrl-C again after 60 seconds to end at once\n"
        assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_ends_the_process_at_once(number: signal.Signals) -> None:
    with program(same_request_s=0.0) as process:
        assert hear(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert hear(process) == "asked"
        process.send_signal(number)
        assert process.wait(timeout=DEADLINE_S) == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_process_is_ready_is_kept_for_it(number: signal.Signals) -> None:
    """A warning even where it is ignored, as in ranks that torchrun starts, itself started by a shell that does so."""
    ours = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_signals_blocked(), program(before="time.sleep(0.3)") as process:
            process.send_signal(number)
            assert [hear(process), hear(process)] == ["ready", "asked"]
            assert process.communicate()[0] == "ended well\n"
    finally:
        signal.signal(signal.SIGUSR1, ours)


def test_warnings_never_end_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.trainer.resilience.signals.SAME_REQUEST_S", 0.0)
    seen = []
    with StopSignal(first=lambda number: seen.append("first"), again=lambda number: seen.append("again")) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert not stop.preemption_warning
        time.sleep(0.01)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.preemption_warning
        assert seen == ["first"]
        signal.raise_signal(signal.SIGTERM)
    assert seen == ["first", "again"]


def test_nohup_is_respected() -> None:
    with program(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:
        assert hear(process) == "ready"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert hear(process) == "asked"
        out, err = process.communicate()
        assert (out, err.count("stopping"), process.returncode) == ("ended well\n", 1, 0)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []
    with StopSignal(first=seen.append, again=seen.append) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_blocked_signals_arrive_afterwards() -> None:
    seen = []
    with StopSignal(first=seen.append):
        with stop_signals_blocked():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            assert seen == []
        time.sleep(0.01)
        assert seen == [signal.SIGINT]

"""A signal to one rank only, in any phase, stops all ranks at the same place; what was done is saved."""

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import evaluate, train
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.resilience.signals import StopSignal
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.runs import run, steps

WARNED_RANK = 1
# By phase: what is going on when the signal comes, and at which call of it; the steps that are trained, evaluated and
# saved by then, or None if nothing is on record before it is known what was done.
PHASES: dict[str, tuple[Any, str, int, tuple[list[int], list[int]] | None, list[int]]] = {
    "connecting": (train, "device_to_connect_on", 1, None, []),
    "building": (train, "build_engine", 1, None, []),
    "loading": (Checkpointer, "load_latest", 1, ([], []), []),
    # The first evaluation is after step 2, the first save after step 3.
    "a step": (train, "train_step", 2, ([1, 2], []), [2]),
    "an evaluation": (evaluate, "evaluate", 1, ([1, 2], []), [2]),
    "a save": (Checkpointer, "start_saving", 1, ([1, 2, 3], [2]), [3]),
}


def train_with_signal(config: Config, phase: str | None) -> tuple[bool, int]:
    """On a rank: train, with a signal to one rank; return whether to queue the run again, and calls of the phase."""
    calls = []
    with ExitStack() as stack:
        if phase is not None and dist.get_rank() == WARNED_RANK:
            owner, name, number, *_ = PHASES[phase]
            function = getattr(owner, name)

            def signaled(*arguments: Any, **named: Any) -> Any:
                calls.append(1)
                if len(calls) == number:
                    signal.raise_signal(signal.SIGUSR1)
                return function(*arguments, **named)

            stack.enter_context(mock.patch.object(owner, name, signaled))
        stop = stack.enter_context(StopSignal(first=lambda number: None))
        parts = run(config, stop=stop)
        assert stop.preemption_warning == (phase is not None and dist.get_rank() == WARNED_RANK)
    return parts.asks_requeue, len(calls)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_rank_stops_all(tiny_data: Path, tmp_path: Path, ranks: Pools, phase: str) -> None:
    *_, done, saved = PHASES[phase]
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(context=2), steps=4)
    config = replace(
        config, checkpoint=CheckpointConfig(every_steps=3, keep=9), evaluate=EvaluateConfig(every_steps=2, sequences=2)
    )
    answers = ranks(2).run(train_with_signal, config, phase)
    assert [asks_requeue for asks_requeue, _ in answers] == [True, True]
    assert answers[WARNED_RANK][1] > 0
    # It is locked, and so made, between the first two looks at the flag.
    assert (tmp_path / "run").exists() == (phase != "connecting")
    folder = tmp_path / "run"
    assert [int(path.name[5:]) for path in sorted((folder / "checkpoints").glob("step_*"))] == saved
    assert (folder / "metrics.jsonl").exists() == (done is not None)
    assert done is None or (steps(folder, "loss"), steps(folder, "eval_loss")) == done
    assert ranks(2).run(train_with_signal, config, None) == [(False, 0)] * 2
    assert (steps(folder, "loss"), steps(folder, "eval_loss")) == ([1, 2, 3, 4], [2, 4])

"""The recipe of a run: configuration, mesh, model, data, resume, loop."""

import logging
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from farspan.errors import ConfigError, FarspanError, TrainingError
from farspan.parallel.comm import Traffic
from farspan.parallel.fsdp import sharding_bytes
from farspan.parallel.mesh import Mesh
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.steps import finished
from farspan.trainer.config import Config, flat
from farspan.trainer.config_history import record_config
from farspan.trainer.data.integrity import check_integrity
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.data.shuffle import ShuffledSequences
from farspan.trainer.data.source import SPLITS
from farspan.trainer.estimate.summary import describe, format_layers
from farspan.trainer.metrics import MetricsWriter, StepTimer, peak_flops, peak_memory_bytes, progress_line
from farspan.trainer.model.flops import training_flops
from farspan.trainer.optim import build_optimizer, learning_rate, set_learning_rate
from farspan.trainer.replay import replay, write_batch
from farspan.trainer.resilience.agreement import any_rank, check_same, max_over_ranks, on_first_rank, raise_on_all_ranks
from farspan.trainer.resilience.lock import lock_folder
from farspan.trainer.resilience.preflight import run_preflight
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resilience.skip_steps import reason_to_skip, remember
from farspan.trainer.resilience.watchdog import Watchdog
from farspan.trainer.resolve import Resolved, choose_device, resolve
from farspan.trainer.state import TrainState
from farspan.trainer.step import StepResult, train_step
from farspan.trainer.validation import Validation
from farspan.trainer.weights.io import check_weights, load_weights

T = TypeVar("T")

log = logging.getLogger("farspan")


def train(config: Config, ranks: Ranks, stop: StopSignal) -> bool:
    """Run `config` to its last step, or until a stop signal; resume where run.folder left off.

    Returns whether a scheduler's warning stopped it before its end. A FarspanError is raised by all ranks alike.
    """
    with ExitStack() as stack:
        watchdog = Watchdog(config.watchdog, Path(config.run.folder) / "stacks", ranks.rank)
        with watchdog.phase("start", 0):
            run = _start(config, ranks, stop, watchdog, stack)
        if run is None:
            log.info("stopped     while it started; nothing was changed, the same command starts again")
            return any_rank(stop.warned)
        if config.run.replay is not None:
            run.replay(config.run.replay)
            return False
        return not run.loop() and any_rank(stop.warned)


def _start(config: Config, ranks: Ranks, stop: StopSignal, watchdog: Watchdog, stack: ExitStack) -> "_Run | None":
    """Connect, build and load; what has to be closed goes onto the stack. None where a rank was asked to stop."""
    timeout = timedelta(seconds=config.parallel.timeout_s)
    stack.enter_context(connected(ranks, _device_to_meet_on(config, ranks), timeout))
    if any_rank(stop.requested):
        return None
    nodes = run_preflight(Path(config.run.folder), lambda: choose_device(config, ranks.local_rank))
    resolved = raise_on_all_ranks(lambda: resolve(config, ranks))
    splits = {"train": resolved.train_source, "validation": resolved.validation_source}
    check_same(flat(resolved.config) | {f"the data of {name}/": split.fingerprint for name, split in splits.items()})
    log.info("%s", "\n".join((describe(resolved.config, resolved.degrees), *resolved.why, *nodes)))

    def lock() -> None:
        stack.enter_context(lock_folder(Path(config.run.folder), ranks.job))

    on_first_rank(lock)
    on_first_rank(lambda: _check_files(resolved.config))
    run = _Run(resolved, stop, watchdog)
    stack.enter_context(run)
    if any_rank(stop.requested):
        return None
    run.load()
    return run


def _check_files(config: Config) -> None:
    """Raise FarspanError where what the run reads is missing or was changed, before anything large is built."""
    for split in SPLITS:
        check_integrity(Path(config.data.folder) / split)
    if config.run.start_from is not None and not finished(Path(config.run.folder) / "checkpoints"):
        check_weights(Path(config.run.start_from))


def _device_to_meet_on(config: Config, ranks: Ranks) -> torch.device:
    """Return this rank's device; the CPU for a rank that lacks its GPU, since it has to tell the others so."""
    try:
        return choose_device(config, ranks.local_rank)
    except ConfigError:
        return torch.device("cpu")


class _Run:
    """One rank's parts of a run and the loop over steps."""

    def __init__(self, resolved: Resolved, stop: StopSignal, watchdog: Watchdog) -> None:
        config = resolved.config
        self.config, self.device, self.stop, self.watchdog = config, resolved.device, stop, watchdog
        self.folder = Path(config.run.folder)
        self.mesh = Mesh.build(config.parallel, resolved.device.type)
        self.traffic = Traffic()
        self.model = build_model(config, self.mesh, resolved.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.batches = build_batches(config, self.mesh, resolved.device, self.traffic)
        length, seed = config.data.sequence_tokens, config.run.seed
        packed = PackedSequences(resolved.train_source, sequence_tokens=length, seed=seed)
        self.data = ShuffledSequences(packed, seed=seed)
        self.validation = Validation(resolved.validation_source, config)
        self.state = TrainState()
        self.checkpoints = Checkpointer(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            identity=identity(config, resolved.train_source.fingerprint),
            config=config.checkpoint,
        )
        self.resumed_from: Path | None = None
        self.started_from: Path | None = None
        self.peak_flops = peak_flops(self.device, config.train.torch_dtype) * dist.get_world_size()
        self.sharding_bytes = sharding_bytes(self.model, self.model.blocks, self.mesh, config.train.torch_dtype)
        self.writer: MetricsWriter | None = None

    def __enter__(self) -> Self:
        return self

    def load(self) -> None:
        """Go on from the newest checkpoint, or begin with given weights."""
        self.resumed_from = self.checkpoints.load_latest(self.state)
        self.started_from = self.config.run.start_from if self.resumed_from is None else None
        if self.started_from is not None:
            load_weights(self.model, Path(self.started_from))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, FarspanError):
            # All ranks are well: what is being saved is whole soon, and a thread left alone could abort the process.
            with self.watchdog.phase("save", self.state.step):
                self.checkpoints.finish_saving_or_log()
        else:
            self.checkpoints.wait_briefly()
        if self.writer is not None:
            self.writer.close()

    def loop(self) -> bool:
        """Step until the last step or a stop signal; save and evaluate on the way. Return whether nothing is left."""
        config, state, steps = self.config, self.state, self.config.train.steps
        self.say_start()
        on_first_rank(self.open_records)
        stopping = any_rank(self.stop.requested)
        missing = self.is_evaluation_missing()
        nothing_to_do = state.step >= steps and not missing
        if not nothing_to_do and not stopping:
            on_first_rank(lambda: self.recorded(lambda: record_config(self.folder, config, state.step)))
        if missing and not stopping:
            stopping = self.evaluate()
        timer = StepTimer(steps - state.step)
        while state.step < steps and not stopping:
            with self.watchdog.phase("step", state.step + 1):
                stopping, skipped = self.step(timer)
            if skipped is not None and state.skipped_in_a_row > config.skip.most:
                self.give_up(skipped)
            if not stopping and self.is_evaluation_due():
                stopping = self.evaluate()
            if stopping or state.step >= steps or state.step % config.checkpoint.every_steps == 0:
                self.save(beside_steps=config.checkpoint.background and not stopping and state.step < steps)
                stopping = any_rank(self.stop.requested)
            timer.skip()
        with self.watchdog.phase("save", state.step):
            self.checkpoints.finish_saving()
        on_first_rank(self.check_records)
        finished = state.step >= steps and not self.is_evaluation_missing()
        if nothing_to_do:
            log.info("finished    already, at step %d of train.steps=%d: raise it to go on", state.step, steps)
        elif finished:
            log.info("finished    at step %d", state.step)
        elif state.step == 0:
            log.info("stopped     before the first step; nothing was saved")
            return False
        else:
            log.info("stopped     at step %d; the same command resumes", state.step)
        log.info("results     %s/ (config.toml, metrics.jsonl, tensorboard/, checkpoints/)", self.folder)
        log.info("see them    %s --logdir %s/tensorboard", _command("tensorboard"), self.folder)
        return finished

    def say_start(self) -> None:
        if self.resumed_from is not None:
            log.info("resumed     at step %d from %s", self.state.step, self.resumed_from)
        if self.started_from is not None:
            log.info("weights     of %s", self.started_from)

    def save(self, *, beside_steps: bool = False) -> None:
        with self.watchdog.phase("save", self.state.step):
            if beside_steps:
                self.checkpoints.start_saving(self.state)
            else:
                self.checkpoints.save(self.state)

    def step(self, timer: StepTimer) -> tuple[bool, str | None]:
        """Do one update and report it; return whether some rank was asked to stop, and why it was no update."""
        config, state = self.config, self.state
        rate = learning_rate(config.optimizer, state.step, config.train.steps)
        set_learning_rate(self.optimizer, rate)
        self.traffic.take()
        batches = [self.batches.build(self.data.sequence(i), i) for i in self.my_sequences()]
        result = train_step(
            self.model,
            self.optimizer,
            batches,
            context=self.batches.channel,
            max_gradient_norm=config.optimizer.max_gradient_norm,
            reason_to_skip=partial(reason_to_skip, config.skip, state),
        )
        state.advance(
            sequences=config.train.sequences_per_step, tokens=result.labeled_tokens, fingerprint=result.fingerprint
        )
        remember(config.skip, state, result.loss, result.gradient_norm, result.skipped)
        # One exchange for all: the most memory of any rank, and whether any was asked to stop, or has failed to write.
        unrecorded = self.writer is not None and self.writer.error is not None
        memory, stopping, unsaved, unrecorded = max_over_ranks(
            [peak_memory_bytes(self.device), self.stop.requested, self.checkpoints.has_failed, unrecorded]
        )
        seconds, seconds_left = timer.lap()
        if self.writer is not None:
            traffic = self.traffic.take()
            sharding = self.sharding_bytes * len(batches)
            traffic.add("fsdp", sent=sharding, received=sharding)
            record = self.record(result, rate=rate, seconds=seconds, memory=memory, traffic=traffic)
            self.writer.write(record)
            log.info("%s", progress_line(record, config.train.steps, seconds_left))
            if result.skipped is not None:
                log.info("skipped     step %d, no update: %s", state.step, result.skipped)
        if unsaved:
            self.checkpoints.finish_saving()
        if unrecorded:
            on_first_rank(self.check_records)
        return bool(stopping), result.skipped

    def open_records(self) -> None:
        self.writer = self.recorded(lambda: MetricsWriter(self.folder, resumed_step=self.state.step))

    def check_records(self) -> None:
        """Raise TrainingError where a record could not be written."""
        if self.writer is not None and self.writer.error is not None:
            raise self.not_recorded(self.writer.error)

    def recorded(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; raises TrainingError where it cannot write."""
        try:
            return work()
        except OSError as error:
            raise self.not_recorded(error) from None

    def not_recorded(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"run.folder={str(self.folder)!r} cannot be written ({error.strerror or error}): make room, and the same "
            "command goes on from the last checkpoint."
        )

    def give_up(self, reason: str) -> None:
        """Write the batch of the last step and a checkpoint; raise TrainingError."""
        step, count = self.state.step, self.state.skipped_in_a_row
        folder = self.folder / "failed_batch" / f"step_{step:08d}"
        batch = range(self.state.sequences - self.config.train.sequences_per_step, self.state.sequences)
        on_first_rank(lambda: write_batch(folder, {i: self.data.sequence(i) for i in batch}))
        self.save()
        raise TrainingError(
            f"{count} steps in a row had to be skipped, the last, {step}, since {reason}: compute its batch again with "
            f"run.replay={folder}, lower optimizer.learning_rate, or look at the data; the same command goes on with "
            "the next batch."
        )

    def replay(self, folder: Path) -> None:
        """Compute a batch that a run gave up at."""
        self.say_start()
        with self.watchdog.phase("step", self.state.step):
            replay(self.model, self.batches, folder, data_rank=self.mesh.data_rank, groups=self.mesh.degrees.data)

    def record(
        self, result: StepResult, *, rate: float, seconds: float, memory: int, traffic: Traffic
    ) -> dict[str, Any]:
        """Return what is on record of one step; traffic is that of rank 0."""
        config = self.config
        tokens = config.train.sequences_per_step * config.data.sequence_tokens
        flops = training_flops(config.model, self.batches.mechanisms, tokens, result.attention_flops)
        mfu = flops / seconds / self.peak_flops
        return {
            "step": self.state.step,
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "tokens_per_s": tokens / seconds,
            "mfu": mfu if math.isfinite(mfu) else None,
            "peak_memory_bytes": memory,
            "comm_bytes": traffic.sent.total(),
            "comm_bytes_by_kind": dict(traffic.sent),
            "comm_bytes_received_by_kind": dict(traffic.received),
            "learning_rate": rate,
            "tokens": self.state.tokens,
            "step_s": seconds,
            "stream": self.state.stream,
            "skipped": self.state.skipped,
            **({} if result.skipped is None else {"skipped_since": result.skipped}),
            **({} if result.experts is None else result.experts.summary("expert")),
            **({} if result.heads is None else result.heads.summary("head")),
        }

    def my_sequences(self) -> range:
        """Return the indexes of this data-parallel group's sequences of the next step."""
        first = self.state.sequences + self.mesh.data_rank
        return range(first, self.state.sequences + self.config.train.sequences_per_step, self.mesh.degrees.data)

    def is_evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.evaluate.every_steps
        return step >= self.config.train.steps or (every > 0 and step > 0 and step % every == 0)

    def is_evaluation_missing(self) -> bool:
        """Whether the evaluation of the step resumed from was due but a stop prevented it."""
        return self.is_evaluation_due() and on_first_rank(
            lambda: self.writer is not None and not self.writer.has_evaluation(self.state.step)
        )

    def evaluate(self) -> bool:
        """Measure held-out loss and report it; return whether a stop signal prevented that."""

        def poll() -> bool:
            self.watchdog.restart()
            return self.stop.requested

        with self.watchdog.phase("evaluation", self.state.step):
            measured = self.validation.measure(self.model, self.batches, self.mesh, poll)
        if measured is None:
            return True
        if self.writer is not None:
            self.writer.write(self.validation.record(measured, self.state.step))
            self.validation.say(measured)
        return False


def _command(name: str) -> str:
    """Return how to start a program that was installed with this one, from the current folder."""
    installed = Path(sys.executable).parent / name
    if not installed.exists():
        return name
    return str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed)


def identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """Return what a resumed run has to share with the run that it continues, by dotted name."""
    return {
        "run.seed": config.run.seed,
        "data.folder": data_fingerprint,
        "data.sequence_tokens": config.data.sequence_tokens,
        # In full, so that a default that has changed counts too.
        "attention.mechanism": format_layers(config.mechanisms()),
        **{name: value for name, value in flat(config).items() if name.startswith("model.")},
    }

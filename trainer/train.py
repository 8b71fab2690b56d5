"""The recipe of a run, from top to bottom: configuration, mesh, model, data, resume, loop."""

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from farspan.errors import ConfigError, FarspanError
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.batch import BatchThread, DataLoader
from farspan.trainer.build import build_batches
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.checkpoint.identity import identity_defaults, resume_identity
from farspan.trainer.checkpoint.steps import finished
from farspan.trainer.config import Config, flat
from farspan.trainer.data.source import check_integrity
from farspan.trainer.data.validation import describe_sets
from farspan.trainer.engines.choice import build_engine
from farspan.trainer.engines.engine import Engine
from farspan.trainer.estimate.summary import describe, describe_data, describe_rest
from farspan.trainer.evaluate import Validation
from farspan.trainer.metrics import Metrics, record_config, writing_to
from farspan.trainer.optim import learning_rate, set_learning_rate
from farspan.trainer.replay import give_up, replay
from farspan.trainer.resilience.agreement import any_rank, check_same, max_over_ranks, on_first_rank, raise_on_all_ranks
from farspan.trainer.resilience.lock import lock_folder
from farspan.trainer.resilience.preflight import run_preflight
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resilience.skip_steps import reason_to_skip, remember
from farspan.trainer.resilience.watchdog import Watchdog
from farspan.trainer.resolve import Resolved, choose_device, resolve
from farspan.trainer.state import TrainState
from farspan.trainer.step import StepResult, train_step
from farspan.trainer.weights.io import check_weights, fill_with_weights, other_settings
from farspan.trainer.weights.source_files import check_tokenizer, keep_in_run

log = logging.getLogger("farspan")


def train(config: Config, ranks: Ranks, stop: StopSignal) -> bool:
    """Train to the last step, or until a stop signal; resume where run.folder left off.

    Return whether a preemption warning stopped it, so that it should be queued again. All ranks raise the same errors.
    """
    watchdog = Watchdog(config.watchdog, Path(config.run.folder) / "stacks", ranks.rank)
    with ExitStack() as stack:
        with watchdog.phase("start", 0):
            resolved = start_up(config, ranks, stop, stack)
            if resolved is None:
                return stopped_during_start_up(stop)
            config, device = resolved.config, resolved.device
            mesh = Mesh.build(config.parallel, device.type)
            engine = build_engine(config, mesh, device)  # each rank has its shards of model and optimizer
            batches = build_batches(config, mesh, device, Traffic())  # each rank has its context-parallel shard
            thread = stack.enter_context(closing(BatchThread(device)))
            data = DataLoader(config, resolved.train_source, mesh, batches, thread)
            validation = Validation(config, resolved.validation_sets, mesh, batches, thread, stop, watchdog)
            state, checkpoints = TrainState(), build_checkpointer(resolved, engine)
            stack.enter_context(saves_settled(checkpoints, state, watchdog))
            if any_rank(stop.requested):
                return stopped_during_start_up(stop)
            load(config, engine, checkpoints, state)
        if config.run.replay is not None:
            with watchdog.phase("step", state.step):
                replay(engine.model, batches, config.run.replay, mesh)
            return False
        with watchdog.phase("start", state.step):
            metrics = stack.enter_context(closing(Metrics(config, engine, mesh, batches, state.step)))
            stopping, steps = any_rank(stop.requested), config.train.steps
            is_evaluation_missing = validation.is_missing(state.step, metrics)
            has_work = state.step < steps or is_evaluation_missing
            if has_work and not stopping:
                on_first_rank(lambda: record_start(resolved, state))
        if is_evaluation_missing and not stopping:
            stopping = validation.run(engine.wrapped, state.step, metrics)
        while state.step < steps and not stopping:
            with watchdog.phase("step", state.step + 1), metrics.step(state.step + 1):
                rate = learning_rate(config.optimizer, state.step, steps)
                set_learning_rate(engine.optimizer, rate)
                result = update(config, engine, data, state)
                stopping = finish_step(metrics, result, state, rate, checkpoints, stop)
            if state.skipped_in_a_row > config.skip.max_consecutive_skips:
                with watchdog.phase("save", state.step):
                    give_up(config, data, checkpoints, state, str(result.skipped))
            if validation.is_due(state.step) and not stopping:
                stopping = validation.run(engine.wrapped, state.step, metrics)
            if state.step % config.checkpoint.every_steps == 0 or state.step >= steps or stopping:
                in_background = config.checkpoint.background and state.step < steps and not stopping
                with watchdog.phase("save", state.step):
                    checkpoints.start_saving(state) if in_background else checkpoints.save(state)
                    stopping = any_rank(stop.requested)

        with watchdog.phase("save", state.step):
            checkpoints.finish_saving()
            metrics.check()
            is_finished = state.step >= steps and not validation.is_missing(state.step, metrics)
            log_end(config, state.step, is_finished=is_finished, has_work=has_work)
            return not is_finished and any_rank(stop.preemption_warning)


def start_up(config: Config, ranks: Ranks, stop: StopSignal, stack: ExitStack) -> Resolved | None:
    """Connect the ranks, check all that can be checked before the model is built, and lock the run's folder.

    None if a rank was asked to stop. Connection and lock last as long as `stack`.
    """
    timeout = timedelta(seconds=config.parallel.timeout_s)
    stack.enter_context(connected(ranks, device_to_connect_on(config, ranks), timeout))
    if any_rank(stop.requested):
        return None
    nodes = run_preflight(Path(config.run.folder), lambda: choose_device(config, ranks.local_rank))
    resolved = raise_on_all_ranks(lambda: resolve(config, ranks))
    sources = {"train": resolved.train_source, **{name: of.source for name, of in resolved.validation_sets.items()}}
    check_same(flat(resolved.config) | {f"the data of {name}": source.fingerprint for name, source in sources.items()})
    described = describe(resolved.config, resolved.degrees), describe_data(resolved.config, resolved.train_source)
    lines = *described, *describe_sets(resolved.validation_sets), *resolved.reasons, *nodes
    log.info("%s", "\n".join(lines))
    on_first_rank(lambda: check_files_and_lock(resolved, ranks, stack))
    return resolved


def device_to_connect_on(config: Config, ranks: Ranks) -> torch.device:
    """Return this rank's device; the CPU for a rank that lacks its GPU, since it has to report that to the others."""
    try:
        return choose_device(config, ranks.local_rank)
    except ConfigError:
        return torch.device("cpu")


def check_files_and_lock(resolved: Resolved, ranks: Ranks, stack: ExitStack) -> None:
    """Raise FarspanError if another run has the folder, or an input of this run is missing or was changed."""
    config = resolved.config
    for source in (resolved.train_source, *(of.source for of in resolved.validation_sets.values())):
        check_integrity(source.folder)
    weights = finished(config.run.folder / "checkpoints")[-1:]
    if not weights and config.run.start_from is not None:
        check_weights(config.run.start_from)
        weights = [config.run.start_from]
    for folder in weights:
        check_tokenizer(folder, config.data.folder)
    # Last, as it makes the folder.
    stack.enter_context(lock_folder(config.run.folder, ranks.job))


def record_start(resolved: Resolved, state: TrainState) -> None:
    """Write the configuration and, at the first start, what belongs to the weights; raises TrainingError."""
    config = resolved.config
    if state.step == 0:
        with writing_to(config.run.folder):
            keep_in_run(config.run.start_from, config.data.folder, config.run.folder)
    record_config(config.run.folder, config, state.step)
    if rest := describe_rest(config, resolved.train_source, state):
        log.info("%s", rest)


def stopped_during_start_up(stop: StopSignal) -> bool:
    """Return what `train` returns."""
    log.info("stopped     during start-up; nothing was changed, the same command starts again")
    return any_rank(stop.preemption_warning)


def build_checkpointer(resolved: Resolved, engine: Engine) -> Checkpointer:
    config = resolved.config
    return Checkpointer(
        Path(config.run.folder) / "checkpoints",
        engine,
        identity=resume_identity(config, resolved.train_source.fingerprint),
        defaults=identity_defaults(config),
        config=config.checkpoint,
    )


@contextmanager
def saves_settled(checkpoints: Checkpointer, state: TrainState, watchdog: Watchdog) -> Iterator[None]:
    """Leave no save under way behind the block."""
    try:
        yield
    except FarspanError:
        # All ranks are well, so that the save ends soon, and a thread left running could abort the process.
        with watchdog.phase("save", state.step):
            checkpoints.finish_saving_or_log()
        raise
    finally:
        checkpoints.wait_briefly()


def load(config: Config, engine: Engine, checkpoints: Checkpointer, state: TrainState) -> None:
    """Resume from the newest checkpoint, or begin with the weights of run.start_from."""
    resumed_from = checkpoints.load_latest(state)
    if resumed_from is not None:
        log.info("resumed     at step %d from %s", state.step, resumed_from)
        if config.run.start_from is not None:
            log.info("ignored     run.start_from=%s: the run has checkpoints of its own", config.run.start_from)
    elif (weights := config.run.start_from) is not None:
        tensors = engine.state()["model"]
        fill_with_weights(tensors, weights, tied=config.model.tied_embeddings)
        engine.load_state(tensors)
        log.info("weights     from %s", weights)
        if differing := on_first_rank(lambda: other_settings(config, weights)):
            log.info("differing   from the weights' own settings: %s", ", ".join(differing))


def update(config: Config, engine: Engine, data: DataLoader, state: TrainState) -> StepResult:
    """Do one optimizer step on the next batch, or skip it, and advance the state."""
    result = train_step(
        engine,
        data.micro_batches(state.sequences, is_last=state.step + 1 >= config.train.steps),
        context=data.batches.channel,
        reason_to_skip=partial(reason_to_skip, config.skip, state),
    )
    state.advance(
        sequences=config.train.sequences_per_step, tokens=result.labeled_tokens, fingerprint=result.fingerprint
    )
    if result.labeled_tokens:
        remember(config.skip, state, result.loss, result.gradient_norm, result.skipped)
    else:
        # Not counted in a row: nothing is wrong with the run.
        state.skipped += 1
    return result


def finish_step(
    metrics: Metrics, result: StepResult, state: TrainState, rate: float, checkpoints: Checkpointer, stop: StopSignal
) -> bool:
    """Record and log a step; return whether some rank was asked to stop.

    Raises CheckpointError or TrainingError on all ranks where a save or a record has failed.
    """
    # One exchange for the peak memory of any rank, stop requests and failures.
    failed = checkpoints.has_failed or metrics.has_failed
    memory, stopping, failed = max_over_ranks([metrics.peak_memory_bytes(), stop.requested, failed])
    metrics.log_step(result, state, learning_rate=rate, memory=memory)
    if failed:
        checkpoints.finish_saving()
        metrics.check()
    return bool(stopping)


def log_end(config: Config, step: int, *, is_finished: bool, has_work: bool) -> None:
    folder = Path(config.run.folder)
    if not has_work:
        log.info("finished    already, at step %d of train.steps=%d: raise it to go on", step, config.train.steps)
    elif is_finished:
        log.info("finished    at step %d", step)
    elif step == 0:
        log.info("stopped     before the first step; nothing was saved")
        return
    else:
        log.info("stopped     at step %d; the same command resumes", step)
    log.info("results     %s/ (config.toml, metrics.jsonl, tensorboard/, checkpoints/)", folder)
    # The program beside this Python, from the current folder.
    tensorboard = Path(sys.executable).parent / "tensorboard"
    if tensorboard.is_relative_to(Path.cwd()):
        tensorboard = tensorboard.relative_to(Path.cwd())
    program = str(tensorboard if tensorboard.exists() else "tensorboard")
    log.info("view        %s", shlex.join([program, "--logdir", f"{folder}/tensorboard"]))

"""The recipe of a run: configuration, mesh, model, data, resume, loop."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from farspan.parallel.comm import Traffic
from farspan.parallel.fsdp import sharding_bytes
from farspan.parallel.mesh import Degrees, Mesh
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.batch import MicroBatch
from farspan.trainer.build import build_batches, build_model, choose_device, fill_in, open_data
from farspan.trainer.checkpoint import Checkpointer
from farspan.trainer.config import Config
from farspan.trainer.config_io import to_toml
from farspan.trainer.data.packing import IGNORED, PackedSequences
from farspan.trainer.data.source import TokenSource, unigram_bits_per_byte
from farspan.trainer.describe import describe
from farspan.trainer.evaluate import evaluate
from farspan.trainer.faults import StopSignal
from farspan.trainer.flops import training_flops
from farspan.trainer.metrics import MetricsWriter, StepTimer, peak_flops, peak_memory_bytes, progress_line
from farspan.trainer.optim import build_optimizer, learning_rate, set_learning_rate
from farspan.trainer.state import TrainState
from farspan.trainer.step import train_step
from farspan.trainer.validate import validate

log = logging.getLogger("farspan")


def train(config: Config, ranks: Ranks) -> None:
    """Run `config` to its last step, or until a stop signal; resume where run.folder left off."""
    degrees = Degrees.resolve(config.parallel, ranks.world_size)
    validate(config, degrees)
    device = choose_device(config, ranks)
    train_source, held_out_source = open_data(config)
    config = fill_in(config, degrees, device, train_source.vocabulary_size)
    stop = StopSignal()
    stop.install()
    with ExitStack() as stack:
        stack.enter_context(connected(ranks, device))
        log.info("%s", describe(config, degrees, device))
        run = _Run(config, Mesh.build(config.parallel, device.type), device, train_source, held_out_source)
        stack.callback(run.close)
        run.loop(stop)


class _Run:
    """One rank's parts of a run and the loop over steps."""

    def __init__(
        self, config: Config, mesh: Mesh, device: torch.device, train_source: TokenSource, held_out_source: TokenSource
    ) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.folder = Path(config.run.folder)
        self.traffic = Traffic()
        self.model = build_model(config, mesh, device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.batches = build_batches(config, mesh, device, self.traffic)
        length, seed = config.data.sequence_tokens, config.run.seed
        self.data = PackedSequences(train_source, sequence_tokens=length, seed=seed)
        self.held_out = PackedSequences(held_out_source, sequence_tokens=length, seed=seed, shuffle=False, repeat=False)
        self.bytes_per_token = held_out_source.num_bytes / (held_out_source.num_tokens - held_out_source.num_documents)
        self.unigram_bits_per_byte = unigram_bits_per_byte(held_out_source)
        self.state = TrainState(seed=seed, data_fingerprint=train_source.fingerprint)
        self.checkpoints = Checkpointer(
            self.folder / "checkpoints", self.model, self.optimizer, keep=config.checkpoint.keep
        )
        self.resumed_from = self.checkpoints.load_latest(self.state)
        self.writer: MetricsWriter | None = None
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(to_toml(config))
            self.writer = MetricsWriter(self.folder, self.state.step)
        compute_dtype = getattr(torch, config.train.compute_dtype)
        self.peak_flops = peak_flops(device, compute_dtype) * dist.get_world_size()
        self.sharding_bytes = sharding_bytes(self.model, self.model.blocks, mesh, compute_dtype)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def loop(self, stop: StopSignal) -> None:
        """Step until the last step or a stop signal; save and evaluate on the way."""
        config, state, steps = self.config, self.state, self.config.train.steps
        if self.resumed_from is not None:
            log.info("resumed     step %d from %s", state.step, self.resumed_from)
        timer, stopping = StepTimer(steps - state.step), False
        while state.step < steps and not stopping:
            stopping = self.step(timer, stop)
            last = state.step == steps
            save = last or stopping or state.step % config.checkpoint.every_steps == 0
            measure = last or (config.evaluate.every_steps and state.step % config.evaluate.every_steps == 0)
            if measure and not stopping:
                self.evaluate()
            if save:
                log.info("saved       %s", self.checkpoints.save(state))
            timer.skip()
        self.say_goodbye(stopped=state.step < steps)

    def step(self, timer: StepTimer, stop: StopSignal) -> bool:
        """Do one update and report it; return whether some rank was asked to stop."""
        config, state = self.config, self.state
        rate = learning_rate(config.optimizer, state.step, config.train.steps)
        set_learning_rate(self.optimizer, rate)
        state.seed_step(self.mesh.data_rank)
        self.traffic.take()
        batches = [self.batches.build(self.data.sequence(i)) for i in self.my_sequences()]
        result = train_step(
            self.model,
            self.optimizer,
            batches,
            max_gradient_norm=config.optimizer.max_gradient_norm,
            stop_requested=stop.requested,
        )
        state.step += 1
        state.sequences += config.train.sequences_per_step
        state.tokens += result.labelled_tokens
        memory = torch.tensor(peak_memory_bytes(self.device))
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        seconds, seconds_left = timer.lap()
        if self.writer is not None:
            tokens = config.train.sequences_per_step * config.data.sequence_tokens
            flops = training_flops(config.model, tokens, result.visible_pairs)
            mfu = flops / seconds / self.peak_flops
            sent = {**self.traffic.take(), "fsdp": self.sharding_bytes * len(batches)}
            record = {
                "step": state.step,
                "loss": result.loss,
                "grad_norm": result.gradient_norm,
                "tokens_per_s": tokens / seconds,
                "mfu": mfu if mfu == mfu else None,
                "peak_memory_bytes": int(memory),
                "comm_bytes": sum(sent.values()),
                "comm_bytes_by_kind": sent,
                "learning_rate": rate,
                "tokens": state.tokens,
                "step_s": seconds,
            }
            self.writer.write(record)
            log.info("%s", progress_line(record, config.train.steps, seconds_left, rate))
        return result.stop

    def my_sequences(self) -> range:
        """Return the indexes of this data-parallel group's sequences of the next step."""
        first = self.state.sequences + self.mesh.data_rank
        return range(first, self.state.sequences + self.config.train.sequences_per_step, self.mesh.degrees.data)

    def evaluate(self) -> None:
        """Measure held-out loss and report it."""
        self.model.eval()
        measured = evaluate(self.model, self.held_out_batches(), self.config.data.sequence_tokens)
        self.model.train()
        if self.writer is None:
            return
        bits = measured.bits_per_byte(self.bytes_per_token)
        self.writer.write(
            {
                "step": self.state.step,
                "eval_loss": measured.loss,
                "bits_per_byte": bits,
                "unigram_bits_per_byte": self.unigram_bits_per_byte,
                "loss_by_position": measured.by_position,
            }
        )
        log.info("held out    %.3f bits per byte (unigram entropy %.3f)", bits, self.unigram_bits_per_byte)
        shown = "  ".join(f"{where}: {loss:.3f}" for where, loss in measured.by_position.items())
        log.info("            loss by position  %s", shown)

    def held_out_batches(self) -> Iterator[MicroBatch]:
        """Yield this group's share of the held-out sequences; every group gets equally many."""
        wanted, groups = min(self.config.evaluate.sequences, len(self.held_out)), self.mesh.degrees.data
        for index in range(self.mesh.data_rank, -(-wanted // groups) * groups, groups):
            sequence = self.held_out.sequence(min(index, wanted - 1))
            if index >= wanted:
                sequence = replace(sequence, labels=np.full_like(sequence.labels, IGNORED))
            yield self.batches.build(sequence)

    def say_goodbye(self, *, stopped: bool) -> None:
        folder = self.folder
        if stopped:
            log.info("stopped     at step %d; the same command resumes", self.state.step)
        else:
            log.info("finished    at step %d", self.state.step)
        log.info("results     %s/ (config.toml, metrics.jsonl, tensorboard/, checkpoints/)", folder)
        log.info("see them    tensorboard --logdir %s/tensorboard", folder)

"""From packed sequences to this rank's micro-batches: its tokens, labels and rows, and the planned attention."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from farspan.errors import FarspanError, TrainingError
from farspan.kernels.device_copies import copy_to
from farspan.kernels.layers.cross_entropy import check_labels
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import InputSpec
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention, Strategy
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.layout import Shards
from farspan.parallel.mesh import Degrees, Mesh
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PackedSequence, ShuffledSequences, sequence_hash, sequence_seed
from farspan.trainer.data.source import TokenSource
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.flops import attention_flops
from farspan.trainer.model.transformer import ExpertPlaces, SequenceContext
from farspan.trainer.resilience.agreement import raise_on_all_ranks

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """This rank's part of one sequence."""

    tokens: Tensor
    labels: Tensor
    """int64 `[tokens_local]`, both."""
    context: SequenceContext
    valid_tokens: int
    """How many local tokens have a label."""
    real_tokens: int
    """How many local tokens are not padding."""
    attention_flops: int
    """FLOPs of the forward pass for the full sequence in all layers. Like `fingerprint` it is 0 on all ranks of a
    context-parallel group but the first, so that a sum over ranks counts it once."""
    fingerprint: int = 0
    """A hash of the full sequence and its index in the data."""
    seed: int = 0
    """Seeds the random numbers drawn for the sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAttention:
    """How a layer attends; equal layers share their plans."""

    mechanism: Mechanism
    strategy: Strategy
    backend: str

    def plan(self, shards: Shards, model: ModelConfig) -> DistributedAttention:
        return self.strategy.prepare(self.mechanism, shards, model.heads_of(self.mechanism), backend=self.backend)


def work_of_layers(mechanisms: Sequence[Mechanism], rows: Rows) -> Tensor:
    """Return the work of each token in layers with these mechanisms, float64 `[tokens]`."""
    counts = Counter(mechanisms)
    return torch.stack([mechanism.keys_per_query(rows) * layers for mechanism, layers in counts.items()]).sum(dim=0)


def shards_of_one_document(config: Config, degrees: Degrees) -> Shards:
    """Return a sequence of one document as a run shards it, for estimates."""
    return Shards.build(
        Rows.packed([config.data.sequence_tokens]),
        layout=config.parallel.layout,
        degree=degrees.context,
        work=partial(work_of_layers, config.mechanisms()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchBuilder:
    """Shards sequences over the ranks of a context-parallel group, each of which reads the full sequence."""

    model: ModelConfig
    layers: tuple[LayerAttention, ...]
    """All with one channel."""
    layout: str
    device: torch.device
    dtype: torch.dtype
    """That the model computes in."""
    seed: int
    """The run's."""
    expert_channel: Channel | None = None
    """The channel of the ranks that share the experts, in a model with experts."""

    @property
    def channel(self) -> Channel:
        """The channel of the ranks that share a sequence."""
        return self.layers[0].strategy.channel

    def build(self, sequence: PackedSequence, index: int = 0) -> MicroBatch:
        """Return this rank's part of `sequence`, the run's training sequence number `index`.

        Padding added by the layout has no label and no document. What layers find on the device of their plans is
        copied here. Sends nothing and waits for no device, so that a thread of its own can build.
        """
        rows = Rows(position=torch.from_numpy(sequence.position), document=torch.from_numpy(sequence.document))
        channel, device = self.channel, self.device
        rank = channel.rank
        shards = Shards.build(
            rows, layout=self.layout, degree=channel.size, work=partial(work_of_layers, self.mechanisms)
        )
        tokens = shards.shard(torch.from_numpy(sequence.tokens), rank)
        labels = shards.shard(torch.from_numpy(sequence.labels), rank, fill=IGNORED)
        check_labels(labels, self.model.vocabulary_size)
        local = shards.rows_of(rank)
        is_real = local.document >= 0
        planned = {layer: layer.plan(shards, self.model) for layer in dict.fromkeys(self.layers)}
        for layer, attention in planned.items():
            attention.prepare(self._inputs_of(layer.mechanism))
        convolution = experts = None
        if self.model.key_convolution:
            convolution = KeyConvolution.plan(channel, shards, self.model.key_convolution, device)
        if self.expert_channel is not None:
            # Padding of the sequence itself is no token either.
            places = copy_to(shards.index[rank].masked_fill(~is_real, -1), device)
            experts = ExpertPlaces(ExpertCapacity(channel, places), self.expert_channel)
        return MicroBatch(
            tokens=copy_to(tokens, device),
            labels=copy_to(labels, device),
            context=SequenceContext(
                rows=local.to(device),
                attention=tuple(planned[layer] for layer in self.layers),
                key_convolution=convolution,
                experts=experts,
            ),
            valid_tokens=int((labels != IGNORED).sum()),
            real_tokens=int(is_real.sum()),
            attention_flops=attention_flops(self.model, self.mechanisms, rows) if rank == 0 else 0,
            fingerprint=sequence_hash(index, sequence) if rank == 0 else 0,
            seed=sequence_seed(self.seed, index),
        )

    def _inputs_of(self, mechanism: Mechanism) -> InputSpec:
        return InputSpec(
            device=self.device,
            dtype=self.dtype,
            kv_heads=self.model.heads_of(mechanism).kv,
            head_dim=self.model.head_dim,
            value_dim=self.model.head_dim,
        )

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        return tuple(layer.mechanism for layer in self.layers)


class BatchThread:
    """A thread that builds micro-batches while others are computed, on a stream of its own.

        caller    build 1 | launch 1 ........ | launch 2 ........ | launch 3, the last
        thread              build 2             build 3             (nothing)
        device                compute 1           compute 2           compute 3
        its copies        1             2                   3

    What uses a batch waits on the device for its copies, the host for none. An error in the thread is raised by all
    ranks, once they ask for the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "batches", partial(_use_device, device))

    def start(self, name: str, build: Callable[[], MicroBatch]) -> "Future[_Built]":
        """Have a batch built after those started before; name: of its sequence, for errors."""
        return self._thread.submit(self._build, name, build)

    def take(self, started: Sequence["Future[_Built]"]) -> list[MicroBatch]:
        """Return batches once they are built; every rank has to call. All raise the FarspanError of any."""
        built = raise_on_all_ranks(lambda: [one.result() for one in started])
        for one in built:
            if one.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(one.copied)
        return [one.batch for one in built]

    def in_turn(self, builds: Iterable[tuple[str, Callable[[], MicroBatch]]]) -> Generator[MicroBatch]:
        """Yield batches, equally many on every rank, each built while the one before is computed; see `start`.

        Closed early, it leaves none behind that is being built.
        """
        started: deque[Future[_Built]] = deque()
        try:
            for build in builds:
                started.append(self.start(*build))
                if len(started) > 1:
                    yield from self.take([started.popleft()])
            while started:
                yield from self.take([started.popleft()])
        finally:
            wait([one for one in started if not one.cancel()])

    def close(self) -> None:
        """End the thread after the micro-batch that it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _build(self, name: str, build: Callable[[], MicroBatch]) -> "_Built":
        try:
            batch = build()
        except FarspanError:
            raise
        except Exception as error:  # whatever it is, ranks that wait for this one have to learn of it
            log.exception("%s cannot be planned", name)
            # Its first line: libraries may say more.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise TrainingError(f"{name} cannot be planned ({reason}): see the traceback in the log.") from error
        if self._device.type != "cuda":
            return _Built(batch, None)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        return _Built(batch, copied)


@dataclass(frozen=True, slots=True, eq=False)
class _Built:
    """copied: when the device has all of the batch."""

    batch: MicroBatch
    copied: torch.cuda.Event | None


def _use_device(device: torch.device) -> None:
    """Make `device` the one of this thread, which has GPU 0 as it starts, and give it a stream of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


class DataLoader:
    """The training sequences in their order, and this rank's micro-batches of each step.

    The thread plans the next step's micro-batches while this step computes.
    """

    def __init__(
        self, config: Config, source: TokenSource, mesh: Mesh, batches: BatchBuilder, thread: BatchThread
    ) -> None:
        length, seed = config.data.sequence_tokens, config.run.seed
        self._sequences = ShuffledSequences(source, sequence_tokens=length, seed=seed)
        self._per_step, self._mesh, self.batches = config.train.sequences_per_step, mesh, batches
        self._thread = thread
        self._planned: dict[int, list[Future[_Built]]] = {}
        """Of the step that begins with a sequence, by the sequence."""

    def micro_batches(self, first: int, *, is_last: bool = False) -> list[MicroBatch]:
        """Return those of this data-parallel group in the step that begins with sequence `first`; waits for them.

        Unless the step is the last, the thread then starts on those of the next one, whose errors are raised when
        that step asks for them. Every rank has to call.
        """
        if first not in self._planned:
            self._plan(first)
        batches = self._thread.take(self._planned.pop(first))
        if not is_last:
            self._plan(first + self._per_step)
        return batches

    def sequences(self, first: int) -> dict[int, PackedSequence]:
        """Return the sequences of all groups in the step that begins with sequence `first`, by index."""
        return {index: self._sequences.sequence(index) for index in range(first, first + self._per_step)}

    def _plan(self, first: int) -> None:
        group = range(first + self._mesh.data_rank, first + self._per_step, self._mesh.degrees.data)
        self._planned[first] = [
            self._thread.start(f"training sequence {index}", partial(self._build, index)) for index in group
        ]

    def _build(self, index: int) -> MicroBatch:
        return self.batches.build(self._sequences.sequence(index), index)

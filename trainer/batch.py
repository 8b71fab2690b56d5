"""From packed sequences to this rank's micro-batches: its tokens, labels and rows, and the planned attention."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """This rank's part of one sequence."""

    tokens: Tensor
    labels: Tensor
    """int64 `[tokens_local]`, both."""
    context: SequenceContext
    attention_flops: int
    """FLOPs of the forward pass for the full sequence in all layers. Like `fingerprint` it is 0 on all ranks of a
    context-parallel group but the first, so that a sum over ranks counts it once."""
    fingerprint: int = 0
    """A hash of the full sequence and its index in the data."""
    seed: int = 0
    """Seeds the random numbers drawn for the sequence."""

    @property
    def valid_tokens(self) -> int:
        """How many local tokens have a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def real_tokens(self) -> int:
        """How many local tokens are not padding."""
        return int((self.context.rows.document >= 0).sum())


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

        Padding added by the layout has no label and no document.
        """
        rows = Rows(position=torch.from_numpy(sequence.position), document=torch.from_numpy(sequence.document))
        channel = self.channel
        rank = channel.rank
        shards = Shards.build(
            rows, layout=self.layout, degree=channel.size, work=partial(work_of_layers, self.mechanisms)
        )
        tokens = shards.shard(torch.from_numpy(sequence.tokens), rank)
        labels = shards.shard(torch.from_numpy(sequence.labels), rank, fill=IGNORED)
        planned = {layer: layer.plan(shards, self.model) for layer in dict.fromkeys(self.layers)}
        convolution = experts = None
        if self.model.key_convolution:
            convolution = KeyConvolution.plan(channel, shards, self.model.key_convolution, self.device)
        if self.expert_channel is not None:
            # Padding of the sequence itself is no token either.
            places = shards.index[rank].masked_fill(shards.rows_of(rank).document < 0, -1).to(self.device)
            experts = ExpertPlaces(ExpertCapacity(channel, places), self.expert_channel)
        return MicroBatch(
            tokens=tokens.to(self.device),
            labels=labels.to(self.device),
            context=SequenceContext(
                rows=shards.rows_of(rank).to(self.device),
                attention=tuple(planned[layer] for layer in self.layers),
                key_convolution=convolution,
                experts=experts,
            ),
            attention_flops=attention_flops(self.model, self.mechanisms, rows) if rank == 0 else 0,
            fingerprint=sequence_hash(index, sequence) if rank == 0 else 0,
            seed=sequence_seed(self.seed, index),
        )

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        return tuple(layer.mechanism for layer in self.layers)


class DataLoader:
    """The training sequences in their order, and this rank's micro-batches of each step."""

    def __init__(self, config: Config, source: TokenSource, mesh: Mesh, batches: BatchBuilder) -> None:
        length, seed = config.data.sequence_tokens, config.run.seed
        self._sequences = ShuffledSequences(source, sequence_tokens=length, seed=seed)
        self._per_step, self._mesh, self.batches = config.train.sequences_per_step, mesh, batches

    def micro_batches(self, first: int) -> list[MicroBatch]:
        """Return those of this data-parallel group in the step that begins with sequence `first`."""
        group = range(first + self._mesh.data_rank, first + self._per_step, self._mesh.degrees.data)
        return [self.batches.build(self._sequences.sequence(index), index) for index in group]

    def sequences(self, first: int) -> dict[int, PackedSequence]:
        """Return the sequences of all groups in the step that begins with sequence `first`, by index."""
        return {index: self._sequences.sequence(index) for index in range(first, first + self._per_step)}

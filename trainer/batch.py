"""From a packed sequence to what this rank computes on: its tokens, labels and rows, and the planned attention."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import DistributedAttention, Strategy
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.layout import Shards
from farspan.trainer.data.packing import IGNORED, PackedSequence
from farspan.trainer.data.sample_hash import fingerprint, sequence_seed
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.flops import attention_flops
from farspan.trainer.model.transformer import ExpertPlaces, SequenceContext


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """This rank's part of one sequence; tokens and labels int64 `[tokens_local]`.

    attention_flops: forward, of the whole sequence in all layers. fingerprint: of the whole sequence and its place in
    the data. Both are counted by the first rank of a context-parallel group alone, so that a sum over ranks counts them
    once. seed: of what is drawn for the sequence.
    """

    tokens: Tensor
    labels: Tensor
    context: SequenceContext
    attention_flops: int
    fingerprint: int = 0
    seed: int = 0

    @property
    def valid_tokens(self) -> int:
        """How many local tokens have a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def real_tokens(self) -> int:
        """How many local tokens are no padding."""
        return int((self.context.rows.document >= 0).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAttention:
    """What a layer attends by; layers that are equal share their plans."""

    mechanism: Mechanism
    strategy: Strategy
    backend: str

    def plan(self, shards: Shards, model: ModelConfig) -> DistributedAttention:
        return self.strategy.prepare(self.mechanism, shards, model.heads_of(self.mechanism), backend=self.backend)


def work_of_layers(mechanisms: Sequence[Mechanism], rows: Rows) -> Tensor:
    """Return the work of each token in layers with these mechanisms, float64 `[tokens]`."""
    counts = Counter(mechanisms)
    return torch.stack([mechanism.keys_per_query(rows) * layers for mechanism, layers in counts.items()]).sum(dim=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchBuilder:
    """Deals sequences to the ranks of a context-parallel group, each of which reads the whole sequence.

    layers: of each layer the mechanism, strategy and backend; the first layer's channel is that of all.
    expert_channel: of the ranks that hold the experts, for a model that has these. seed: of the run.
    """

    model: ModelConfig
    layers: tuple[LayerAttention, ...]
    layout: str
    device: torch.device
    seed: int
    expert_channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        """Of the ranks that share a sequence."""
        return self.layers[0].strategy.channel

    def build(self, sequence: PackedSequence, index: int = 0) -> MicroBatch:
        """Return this rank's part of `sequence`, number `index` of those that a run trains on.

        Padding added by the layout has no label and no document.
        """
        rows = Rows(position=torch.from_numpy(sequence.position), document=torch.from_numpy(sequence.document))
        channel = self.channel
        rank = channel.rank
        shards = Shards.build(rows, layout=self.layout, degree=channel.size, work=self.work)
        tokens = shards.shard(torch.from_numpy(sequence.tokens), rank)
        labels = shards.shard(torch.from_numpy(sequence.labels), rank, fill=IGNORED)
        planned = {layer: layer.plan(shards, self.model) for layer in dict.fromkeys(self.layers)}
        convolution = None
        if self.model.key_convolution:
            convolution = KeyConvolution.plan(channel, shards, self.model.key_convolution, self.device)
        mine = shards.rows_of(rank)
        return MicroBatch(
            tokens=tokens.to(self.device),
            labels=labels.to(self.device),
            context=SequenceContext(
                rows=mine.to(self.device),
                attends=tuple(planned[layer] for layer in self.layers),
                key_convolution=convolution,
                experts=self._places(shards),
            ),
            attention_flops=attention_flops(self.model, self.mechanisms, rows) if rank == 0 else 0,
            fingerprint=fingerprint(index, sequence) if rank == 0 else 0,
            seed=sequence_seed(self.seed, index),
        )

    def _places(self, shards: Shards) -> ExpertPlaces | None:
        if self.expert_channel is None:
            return None
        rank = self.channel.rank
        # Rows that pad the sequence itself are no tokens either.
        index = shards.index[rank].masked_fill(shards.rows_of(rank).document < 0, -1)
        return ExpertPlaces(ExpertCapacity(self.channel, index.to(self.device)), self.expert_channel)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        return tuple(layer.mechanism for layer in self.layers)

    def work(self, rows: Rows) -> Tensor:
        """Return the work of each token in all layers, float64 `[tokens]`."""
        return work_of_layers(self.mechanisms, rows)

"""From a packed sequence to what this rank computes on: its tokens, labels and rows, and the planned attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.rows import Rows
from farspan.parallel.key_convolution import KeyConvolution
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import Strategy
from farspan.trainer.data.packing import IGNORED, PackedSequence
from farspan.trainer.model.transformer import SequenceContext


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """This rank's part of one sequence; tokens and labels int64 `[tokens_local]`.

    visible_pairs: (query, key) pairs per head of the whole sequence; counted by the first rank of a context-parallel
    group alone, so that a sum over ranks counts them once.
    """

    tokens: Tensor
    labels: Tensor
    context: SequenceContext
    visible_pairs: int

    @property
    def valid_tokens(self) -> int:
        """How many local tokens have a label."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchBuilder:
    """Deals sequences to the ranks of a context-parallel group, each of which reads the whole sequence.

    key_convolution: keys that the model's convolution on keys reads; 0 if it has none.
    """

    strategy: Strategy
    mechanism: Mechanism
    heads: Heads
    layout: str
    backend: str
    device: torch.device
    key_convolution: int

    def build(self, sequence: PackedSequence) -> MicroBatch:
        """Return this rank's part of `sequence`; padding added by the layout has no label and no document."""
        rows = Rows(position=torch.from_numpy(sequence.position), document=torch.from_numpy(sequence.document))
        rank, degree = self.strategy.channel.rank, self.strategy.channel.size
        shards = Shards.deal(rows, layout=self.layout, degree=degree, work=self.mechanism.visible_keys)
        tokens = shards.shard(torch.from_numpy(sequence.tokens), rank)
        labels = shards.shard(torch.from_numpy(sequence.labels), rank, fill=IGNORED)
        attend = self.strategy.prepare(self.mechanism, shards, self.heads, backend=self.backend)
        convolution = None
        if self.key_convolution:
            convolution = KeyConvolution.plan(self.strategy.channel, shards, self.key_convolution, self.device)
        mine = shards.rows_of(rank)
        return MicroBatch(
            tokens=tokens.to(self.device),
            labels=labels.to(self.device),
            context=SequenceContext(rows=mine.to(self.device), attend=attend, key_convolution=convolution),
            visible_pairs=self.mechanism.visible_pairs(rows, rows) if rank == 0 else 0,
        )

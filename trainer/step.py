"""One optimizer step: the mean loss over every labeled token of the global batch, and its gradient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.comm import Channel
from farspan.trainer.batch import MicroBatch
from farspan.trainer.engines.engine import Engine
from farspan.trainer.load_balance import ExpertBalance, ExpertLoad
from farspan.trainer.model.experts import ExpertFeedForward
from farspan.trainer.model.head_mixture import HeadMixture
from farspan.trainer.resilience.skip_steps import not_finite


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """A step over the global batch; equal on all ranks."""

    loss: float
    """Mean nats per labeled token, NaN without any."""
    gradient_norm: float
    """Before clipping."""
    labeled_tokens: int
    attention_flops: float
    """The forward pass only."""
    fingerprint: int
    """The sum of those of its sequences."""
    experts: ExpertLoad | None
    heads: ExpertLoad | None
    """How tokens chose experts and attention heads; None without such routers."""
    skipped: str | None
    """Why the step was no update, None if it was one."""


def train_step(
    engine: Engine,
    batches: Sequence[MicroBatch],
    *,
    context: Channel,
    reason_to_skip: Callable[[float, float], str | None] = not_finite,
) -> StepResult:
    """Accumulate gradients over `batches`, clip, and update unless there is a reason not to.

    context: of the ranks that share a sequence. reason_to_skip: called with the loss and the gradient norm, which have
    the same bits on all ranks. A skipped step leaves parameters, optimizer and routers as they are; a step without
    labels is one.

    The loss is divided by the labeled tokens of all ranks and all micro-batches, not averaged over averages: so it
    and its gradient do not depend on how tokens are sharded. A balance loss over the step costs another forward pass of
    all micro-batches but the first.
    """
    counted = ((b.valid_tokens, b.attention_flops, b.real_tokens, b.fingerprint) for b in batches)
    counts = [sum(numbers) for numbers in zip(*counted, strict=True)]
    # float64: FLOPs of a large batch do not fit into an integer, and all else is exact. Summed by the hosts.
    of_all_ranks = torch.tensor(counts, dtype=torch.float64)
    dist.all_reduce(of_all_ranks)
    labeled_tokens, attention_flops, real_tokens, fingerprint = of_all_ranks.tolist()
    balances = [
        ExpertBalance(layers, context, int(real_tokens)) if layers else None
        for layers in (engine.model.layers_of(ExpertFeedForward), engine.model.layers_of(HeadMixture))
    ]

    engine.zero_grad()
    _count_ahead(engine, batches[1:], balances)
    total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
    for batch in batches:
        torch.manual_seed(batch.seed)
        losses, *statistics = engine.wrapped(batch.tokens, batch.labels, batch.context)
        loss = losses.sum() / max(labeled_tokens, 1)
        for balance, of_layers in zip(balances, statistics, strict=True):
            loss = loss if balance is None else loss + balance.loss(of_layers)
        engine.backward(loss)
        total += losses.detach().sum(dtype=torch.float64)
    dist.all_reduce(total)
    verdict = _Verdict(total, labeled_tokens, reason_to_skip)
    # All ranks make the calls of a step whatever the labels, so that none waits for another.
    engine.step(verdict.is_update)
    is_update = verdict.skipped is None
    experts, heads = (None if balance is None else balance.finish(is_update=is_update) for balance in balances)
    return StepResult(
        loss=verdict.loss,
        gradient_norm=verdict.gradient_norm,
        labeled_tokens=int(labeled_tokens),
        attention_flops=attention_flops,
        fingerprint=int(fingerprint),
        experts=experts,
        heads=heads,
        skipped=verdict.skipped,
    )


@dataclass(slots=True, eq=False)
class _Verdict:
    """Whether a step is an update, decided once the gradient is there; loss_sum: over all labels, on the device."""

    loss_sum: Tensor
    labeled_tokens: float
    reason_to_skip: Callable[[float, float], str | None]
    loss: float = math.nan
    gradient_norm: float = math.nan
    skipped: str | None = "no token of its sequences has a label"

    def is_update(self, norm: Tensor) -> bool:
        # The host's only wait for the device.
        loss_sum, self.gradient_norm = torch.stack((self.loss_sum, norm.to(self.loss_sum))).tolist()
        if self.labeled_tokens:
            self.loss = loss_sum / self.labeled_tokens
            self.skipped = self.reason_to_skip(self.loss, self.gradient_norm)
        return self.skipped is None


@torch.no_grad()
def _count_ahead(engine: Engine, batches: Sequence[MicroBatch], balances: Sequence[ExpertBalance | None]) -> None:
    """Count how the tokens of `batches` choose, as they will in their own pass: same kernels, weights and seeds.

    Does nothing where no balance loss spans the step.
    """
    if not any(balance is not None and balance.spans_step for balance in balances):
        return
    for batch in batches:
        torch.manual_seed(batch.seed)
        _, *statistics = engine.wrapped(batch.tokens, None, batch.context)
        for balance, of_layers in zip(balances, statistics, strict=True):
            if balance is not None:
                balance.count_ahead(of_layers)

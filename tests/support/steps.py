"""Training steps on real ranks, and in one process by formula: losses, gradients, loads and biases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PADDING, PackedSequence, PackedSequences
from farspan.trainer.engines.choice import build_engine
from farspan.trainer.load_balance import ExpertLoad
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.optim import learning_rate, set_learning_rate
from farspan.trainer.resolve import open_data
from farspan.trainer.step import train_step
from tests.support.decoder import summed_loss
from tests.support.mixture import Seen, choices, head_choices, scores_of

# A few AdamW updates let differences of 1e-16 grow to some 1e-12; the bar leaves room for another order of sums.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Trajectory:
    """Of each step; loads are None without such routers."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    expert_loads: list[ExpertLoad | None] = field(default_factory=list)
    head_loads: list[ExpertLoad | None] = field(default_factory=list)


Step = Callable[[int, range], tuple[float, float, ExpertLoad | None, ExpertLoad | None]]


def follow(config: Config, parameters: Mapping[str, Tensor], do_step: Step) -> Trajectory:
    """Do the steps of a run, each with its number and the indexes of its sequences; gradients are of all ranks."""
    course, per_step = Trajectory(), config.train.sequences_per_step
    for step in range(config.train.steps):
        loss, norm, expert_load, head_load = do_step(step, range(step * per_step, (step + 1) * per_step))
        course.losses.append(loss)
        course.norms.append(norm)
        # The next step makes gradients anew, so that these stay as they are.
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        course.gradients.append(gradients)
        course.expert_loads.append(expert_load)
        course.head_loads.append(head_load)
    return replace(course, gradients=gathered(course.gradients))


def gathered(gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the full gradients of each step; those of a parameter are gathered once for all steps."""
    full = {name: _full([of_step[name] for of_step in gradients]) for name in gradients[0]}
    assert all(of_step.keys() == full.keys() for of_step in gradients)
    return [{name: of_steps[step] for name, of_steps in full.items()} for step in range(len(gradients))]


def _full(steps: list[Tensor]) -> Sequence[Tensor]:
    first = steps[0]
    if not isinstance(first, DTensor):
        return steps
    # Shards [..., steps] of a tensor [..., steps], which is sharded as each of them is.
    shards = torch.stack([g.to_local() for g in steps], dim=-1)  # pyright: ignore[reportAttributeAccessIssue]
    shape = torch.Size((*first.shape, len(steps)))
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(shards, first.device_mesh, first.placements, shape=shape, stride=stride)
    return sharded.full_tensor().unbind(dim=-1)


class PaddedSequences(PackedSequences):
    """All but every 23rd sequence end in padding, each in another number of tokens."""

    def sequence(self, index: int) -> PackedSequence:
        full = super().sequence(index)
        padding = np.arange(self.sequence_tokens) >= self.sequence_tokens - 7 * index % 23
        return PackedSequence(
            tokens=full.tokens,
            labels=np.where(padding, IGNORED, full.labels),
            position=np.where(padding, 0, full.position).astype(np.int32),
            document=np.where(padding, PADDING, full.document).astype(np.int32),
        )


def without_padding(sequence: PackedSequence) -> PackedSequence:
    real = sequence.document >= 0
    return PackedSequence(**{part.name: getattr(sequence, part.name)[real] for part in fields(PackedSequence)})


def sequences(config: Config) -> PaddedSequences:
    source, _ = open_data(config)
    return PaddedSequences(source, sequence_tokens=config.data.sequence_tokens, seed=config.run.seed)


def train_sharded(config: Config) -> Trajectory:
    """On each rank: the real parts of a run."""
    mesh, device = Mesh.build(config.parallel, "cpu"), torch.device("cpu")
    engine = build_engine(config, mesh, device)
    batches, data = build_batches(config, mesh, device, Traffic()), sequences(config)

    def do_step(step: int, indexes: range) -> tuple[float, float, ExpertLoad | None, ExpertLoad | None]:
        set_learning_rate(engine.optimizer, learning_rate(config.optimizer, step, config.train.steps))
        done = train_step(
            engine,
            [batches.build(data.sequence(i)) for i in indexes[mesh.data_rank :: mesh.degrees.data]],
            context=batches.channel,
        )
        return done.loss, done.gradient_norm, done.experts, done.heads

    return follow(config, dict(engine.model.named_parameters()), do_step)


def initial_parameters(config: Config) -> dict[str, Tensor]:
    model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}  # pyright: ignore


@dataclass(frozen=True)
class Family:
    """Routers of one kind: their settings, biases by name, logits of a sequence by layer, and what tokens chose.

    choose: from the logits and bias of one layer to what was wanted and what of this was computed, bool `[T, E]`.
    """

    settings: ExpertsConfig | HeadMixtureConfig
    biases: dict[str, Tensor]
    logits: Callable[[Seen], list[Tensor]]
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    shares: Callable[[Tensor], Tensor]

    def losses_and_load(self, seen: Sequence[Seen]) -> tuple[Tensor, ExpertLoad | None]:
        """The auxiliary losses of a step and its loads; biases move."""
        if not self.biases:
            return torch.zeros(()), None
        layers = [self.logits(sequence) for sequence in seen]
        tokens, settings = sum(len(sequence[0]) for sequence in layers), self.settings
        chosen = [[self.choose(*pair) for pair in zip(of, self.biases.values(), strict=True)] for of in layers]
        # [sequences, layers, E]
        counts = torch.stack([torch.stack([wanted.sum(0) for wanted, _ in of]) for of in chosen])
        balance, z = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        for number, sequence in enumerate(layers):
            of_loss = counts.sum(0) if settings.balance_over == "step" else counts[number]
            for layer, of_layer in zip(sequence, of_loss, strict=True):
                part = len(layer) / tokens
                share = self.shares(layer).mean(0)
                fractions = of_layer.double() / of_layer.sum()
                balance = balance + part * len(of_layer) * (fractions * share).sum()
                z = z + part * torch.logsumexp(layer, -1).square().mean()
        balance, z = settings.balance_loss * balance, settings.z_loss * z
        for bias, of_layer in zip(self.biases.values(), counts.sum(0), strict=True):
            bias += settings.bias_rate * (of_layer.double().mean() - of_layer).sign()
        dropped = torch.tensor([[int((wanted & ~computed).sum()) for wanted, computed in of] for of in chosen]).sum(0)
        biases = torch.stack(list(self.biases.values()))
        return balance + z, ExpertLoad(
            counts=counts.sum(0), dropped=dropped, balance_loss=balance.item(), z_loss=z.item(), bias=biases
        )


def families(config: Config, names: Sequence[str]) -> tuple[Family, Family]:
    """Those of experts and of heads, in a model that has parameters of these names."""
    model, experts = config.model, config.model.experts

    def biases(router: str) -> dict[str, Tensor]:
        """By name; the routers say how many there are."""
        layers = [name.removesuffix(router) for name in names if name.endswith(router)]
        count = experts.count if router.startswith("feed_forward") else _choices(config)
        return {f"{layer}{router.partition('.')[0]}.bias": torch.zeros(count, dtype=torch.float64) for layer in layers}

    def share_of_expert(logits: Tensor) -> Tensor:
        scores = scores_of(experts, logits)
        return scores / scores.sum(-1, keepdim=True)

    def choose_heads(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        chosen = head_choices(model, logits, bias)
        return chosen, chosen

    return (
        Family(
            experts, biases("feed_forward.router.weight"), lambda seen: seen.experts,
            lambda logits, bias: choices(experts, logits, bias), share_of_expert,
        ),
        Family(
            model.head_mixture, biases("attention.head_router.weight"), lambda seen: seen.heads, choose_heads,
            lambda logits: logits.softmax(-1),
        ),
    )  # fmt: skip


def _choices(config: Config) -> int:
    model, mixture = config.model, config.model.head_mixture
    return mixture.count if mixture.kind == "experts" else model.heads - model.kv_heads * mixture.shared


def train_reference(config: Config, start: dict[str, Tensor]) -> Trajectory:
    """In one process, by formula, without padding, with torch's own gradient clipping and AdamW."""
    optim, data = config.optimizer, sequences(config)
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    of_experts, of_heads = families(config, list(parameters))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )

    def do_step(step: int, indexes: range) -> tuple[float, float, ExpertLoad | None, ExpertLoad | None]:
        set_learning_rate(optimizer, learning_rate(optim, step, config.train.steps))
        batch = [without_padding(data.sequence(i)) for i in indexes]
        count = sum(int((sequence.labels != -100).sum()) for sequence in batch)
        seen = [Seen() for _ in batch]
        known = parameters | of_experts.biases | of_heads.biases
        sums = [summed_loss(known, config, *each) for each in zip(batch, seen, strict=True)]
        loss = torch.stack(sums).sum() / count
        of_expert_losses, expert_load = of_experts.losses_and_load(seen)
        of_head_losses, head_load = of_heads.losses_and_load(seen)
        optimizer.zero_grad()
        (loss + of_expert_losses + of_head_losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), optim.max_gradient_norm)
        optimizer.step()
        return loss.item(), norm.item(), expert_load, head_load

    return follow(config, parameters, do_step)


def assert_same(found: Trajectory, truth: Trajectory) -> None:
    """Loads to the last token, all else to TOLERANCE."""
    largest = max(abs(x - y) for x, y in zip(found.losses + found.norms, truth.losses + truth.norms, strict=True))
    for a, b in zip(found.gradients, truth.gradients, strict=True):
        assert a.keys() == b.keys()
        largest = max(largest, *((a[name] - b[name]).abs().max().item() for name in a))
    loads = zip(found.expert_loads + found.head_loads, truth.expert_loads + truth.head_loads, strict=True)
    for number, (a, b) in enumerate(loads):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert torch.equal(a.counts, b.counts), number
        assert torch.equal(a.dropped, b.dropped), number
        largest = max(
            largest,
            (a.bias - b.bias).abs().max().item(),
            abs(a.balance_loss - b.balance_loss),
            abs(a.z_loss - b.z_loss),
        )
    assert largest <= TOLERANCE


def two_steps(configs: list[Config]) -> list[Trajectory]:
    """On each rank: two steps of every run."""
    return [train_sharded(replace(config, train=replace(config.train, steps=2))) for config in configs]

"""Ten training steps of models with experts: whoever holds experts and tokens, all is as in one process.

The truth computes every expert on every token; see `test_equivalence.py` for the rest of the decoder. Losses, clipped
norms, every gradient, auxiliary losses, loads and biases are compared in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.balance import ExpertLoad
from farspan.trainer.config import Config
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.optim import learning_rate
from tests.ranks import RankPool
from tests.trainer import tiny
from tests.trainer.mixture import choices, scores_of
from tests.trainer.test_equivalence import (
    STEPS,
    TOLERANCE,
    Trajectory,
    initial_parameters,
    sequences,
    summed_loss,
    train_dealt,
)

EXPERTS = {
    "softmax": ExpertsConfig(count=8, per_token=2, feed_forward=16, balance_loss=0.02, z_loss=0.01),
    "sigmoid, biased, shared, dense first": ExpertsConfig(
        count=8, per_token=3, feed_forward=16, shared=24, layers="dense, experts", score="sigmoid", scale=1.5,
        bias_rate=0.02, balance_loss=0.05, balance_over="step",
    ),
    "not normalised": ExpertsConfig(count=8, per_token=1, feed_forward=16, normalised=False, z_loss=0.1),
    "the heaviest within a capacity": ExpertsConfig(
        count=8, per_token=2, feed_forward=16, capacity=0.9, balance_loss=0.02, scale=0.5
    ),
    "the first within a capacity": ExpertsConfig(
        count=8, per_token=3, feed_forward=16, capacity=1.1, drop="position", score="sigmoid", bias_rate=0.01
    ),
    "experts choose": ExpertsConfig(
        count=8, per_token=2, feed_forward=16, choice="experts", normalised=False, z_loss=0.01, shared=8
    ),
}  # fmt: skip


def auxiliary(config: Config, logits: list[list[Tensor]], chosen: list[Tensor], together: int) -> tuple[Tensor, Tensor]:
    """Balance and z-loss of a step, from its sequences' logits by layer and the counts so far; summed over layers.

    together: sequences that are worked on at the same time, for the loss over the step.
    """
    experts, tokens = config.model.experts, sum(len(sequence[0]) for sequence in logits)
    balance, z = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for number, (sequence, counts) in enumerate(zip(logits, chosen, strict=True)):
        if experts.balance_over == "step":
            counts = torch.stack(chosen[: (number // together + 1) * together]).sum(0)
        for layer, of_layer in zip(sequence, counts, strict=True):
            scores = scores_of(experts, layer)
            share = (scores / scores.sum(-1, keepdim=True)).mean(0)
            part = len(layer) / tokens
            balance = balance + part * experts.count * (of_layer / of_layer.sum() * share).sum()
            z = z + part * torch.logsumexp(layer, -1).square().mean()
    return experts.balance_loss * balance, experts.z_loss * z


def count_choices(config: Config, logits: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of each expert in each layer, `[layers, E]`, and those that were dropped, `[layers]`."""
    chosen = [choices(config.model.experts, *layer) for layer in zip(logits, biases, strict=True)]
    return torch.stack([wanted.sum(0) for wanted, _ in chosen]), torch.stack([(w & ~k).sum() for w, k in chosen])


def train_alone(config: Config, start: dict[str, Tensor], together: int) -> Trajectory:
    experts, optim = config.model.experts, config.optimizer
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    routers = [name.removesuffix("router.weight") for name in parameters if name.endswith("feed_forward.router.weight")]
    biases = {f"{name}bias": torch.zeros(experts.count, dtype=torch.float64) for name in routers}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    data, course = sequences(config), Trajectory([], [], [])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, STEPS)
        per_step = config.train.sequences_per_step
        batch = [data.sequence(step * per_step + i) for i in range(per_step)]
        count = sum(int((sequence.labels != -100).sum()) for sequence in batch)
        logits: list[list[Tensor]] = [[] for _ in batch]
        sums = [
            summed_loss(parameters | biases, config, sequence, seen)
            for sequence, seen in zip(batch, logits, strict=True)
        ]
        loss = torch.stack(sums).sum() / count
        counted = [count_choices(config, sequence, list(biases.values())) for sequence in logits]
        chosen = [counts for counts, _ in counted]
        balance, z_loss = auxiliary(config, logits, chosen, together)
        optimizer.zero_grad()
        (loss + balance + z_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), optim.max_gradient_norm)
        optimizer.step()
        load = torch.stack(chosen).sum(0)
        for bias, of_layer in zip(biases.values(), load, strict=True):
            bias += experts.bias_rate * (of_layer.double().mean() - of_layer).sign()
        course.losses.append(loss.item())
        course.norms.append(norm.item())
        course.gradients.append({name: p.grad.clone() for name, p in parameters.items()})  # pyright: ignore
        course.loads.append(
            ExpertLoad(
                counts=load,
                dropped=torch.stack([dropped for _, dropped in counted]).sum(0),
                balance_loss=balance.item(),
                z_loss=z_loss.item(),
                bias=torch.stack(list(biases.values())).float(),
            )
        )
    return course


def assert_alike(mine: Trajectory, truth: Trajectory) -> None:
    largest = 0.0
    for step in range(STEPS):
        a, b = mine.loads[step], truth.loads[step]
        assert a is not None
        assert b is not None
        assert torch.equal(a.counts, b.counts), step
        assert torch.equal(a.dropped, b.dropped), step
        assert torch.allclose(a.bias, b.bias, rtol=0, atol=1e-7)
        largest = max(largest, abs(a.balance_loss - b.balance_loss), abs(a.z_loss - b.z_loss))
        largest = max(largest, abs(mine.losses[step] - truth.losses[step]), abs(mine.norms[step] - truth.norms[step]))
        assert mine.gradients[step].keys() == truth.gradients[step].keys()
        for name, gradient in mine.gradients[step].items():
            largest = max(largest, (gradient - truth.gradients[step][name]).abs().max().item())
    assert largest <= TOLERANCE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("experts")
    return tiny.config(tiny.make_data(folder), folder / "run", ParallelConfig(strategy="single"))


Truth = Callable[[str, int], Trajectory]


@pytest.fixture(scope="module")
def truth(base: Config, ranks: Callable[[int], RankPool]) -> Truth:
    known: dict[tuple[str, int], Trajectory] = {}

    def compute(experts: str, together: int) -> Trajectory:
        if (experts, together) not in known:
            config = tiny.with_model(base, experts=EXPERTS[experts])
            known[experts, together] = train_alone(config, ranks(1).run(initial_parameters, config)[0], together)
        return known[experts, together]

    return compute


# (context, dp_shard, expert, strategy): every degree of each axis, folded and not. Kinds of experts take turns, as ten
# steps on 8 ranks take ten seconds.
MESHES = [
    (1, 2, 2, "single"), (2, 1, 1, "ring"), (2, 1, 2, "ulysses"), (2, 2, 1, "ulysses"), (2, 2, 2, "ring"),
    (2, 2, 4, "ulysses"), (4, 1, 4, "ring"), (4, 2, 4, "ulysses"), (4, 2, 8, "ring"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("context", "data", "expert", "strategy", "experts"),
    [(*mesh, list(EXPERTS)[number % len(EXPERTS)]) for number, mesh in enumerate(MESHES)],
)
def test_ten_steps_do_not_depend_on_the_ranks(
    base: Config,
    truth: Truth,
    ranks: Callable[[int], RankPool],
    context: int,
    data: int,
    expert: int,
    strategy: str,
    experts: str,
) -> None:
    parallel = ParallelConfig(context=context, dp_shard=data, expert=expert, strategy=strategy)
    config = tiny.with_model(replace(base, parallel=parallel), experts=EXPERTS[experts])
    courses = ranks(context * data).run(train_dealt, config)
    for course in (courses[0], courses[-1]):
        assert_alike(course, truth(experts, data))


VARIANTS = {
    "recompute": lambda config: replace(
        config, parallel=ParallelConfig(context=4, expert=2), train=replace(config.train, recompute="block")
    ),
    "accumulation under recompute": lambda config: replace(
        config, parallel=ParallelConfig(dp_shard=1, strategy="single"), train=replace(config.train, recompute="block")
    ),
    "replicas": lambda config: replace(config, parallel=ParallelConfig(context=2, dp_replicate=2, expert=2)),
    "8 ranks of context and of experts": lambda config: replace(
        config, parallel=ParallelConfig(context=8, expert=8, layout="striped")
    ),
}


@pytest.mark.parametrize(("variant", "experts"), list(zip(VARIANTS, [*EXPERTS, *EXPERTS][1:], strict=False)))
def test_variants_of_the_run(
    base: Config, truth: Truth, ranks: Callable[[int], RankPool], variant: str, experts: str
) -> None:
    config: Config = tiny.with_model(VARIANTS[variant](base), experts=EXPERTS[experts])
    parallel = config.parallel
    data = parallel.dp_replicate * max(parallel.dp_shard, 1)
    courses = ranks(data * parallel.context).run(train_dealt, config)
    assert_alike(courses[-1], truth(experts, data))

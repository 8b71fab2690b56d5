"""Ten training steps: losses and all parameters' gradients are the same however the work is dealt to ranks.

The truth is a decoder written here a second time from its formulas, on whole sequences in one process, with torch's
own cross-entropy, gradient clipping and AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.strategy import STRATEGIES
from farspan.trainer.balance import ExpertLoad
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequence, PackedSequences
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.optim import build_optimizer, learning_rate, set_learning_rate
from farspan.trainer.resolve import open_data
from farspan.trainer.step import train_step
from tests.ranks import RankPool
from tests.trainer import tiny
from tests.trainer.mixture import Seen, head_gates, mixed
from tests.trainer.recurrence import gated_recurrence

STEPS = 10
# Ten AdamW updates let differences of 1e-16 grow to some 1e-12; the bar leaves room for another order of sums.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    loads: list[ExpertLoad | None] = field(default_factory=list)
    head_loads: list[ExpertLoad | None] = field(default_factory=list)


def sequences(config: Config) -> PackedSequences:
    source, _ = open_data(config)
    return PackedSequences(source, sequence_tokens=config.data.sequence_tokens, seed=config.run.seed)


def train_dealt(config: Config, steps: int = STEPS) -> Trajectory:
    """On each rank: the real parts of a run; gradients are gathered whole."""
    mesh, device = Mesh.build(config.parallel, "cpu"), torch.device("cpu")
    model = build_model(config, mesh, device)
    optimizer = build_optimizer(model, config.optimizer)
    batches, data = build_batches(config, mesh, device, Traffic()), sequences(config)
    result = Trajectory([], [], [])
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, steps))
        per_step = config.train.sequences_per_step
        mine = range(step * per_step + mesh.data_rank, (step + 1) * per_step, mesh.degrees.data)
        done = train_step(
            model,
            optimizer,
            [batches.build(data.sequence(i)) for i in mine],
            context=batches.channel,
            max_gradient_norm=config.optimizer.max_gradient_norm,
        )
        result.losses.append(done.loss)
        result.norms.append(done.gradient_norm)
        result.gradients.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})  # pyright: ignore
        result.loads.append(done.experts)
        result.head_loads.append(done.heads)
    return result


def initial_parameters(config: Config) -> dict[str, Tensor]:
    model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}  # pyright: ignore


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotate(x: Tensor, position: Tensor, base: float, rotated: int) -> Tensor:
    """Rotary embedding of the first R features as multiplication of complex numbers, i paired with i + R/2."""
    half = (rotated or x.shape[-1]) // 2
    angle = position[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def convolved(k: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Keys and SiLU of the weighted keys up to them; tokens of a document stand in a row."""
    taps = weight.view(*k.shape[1:], -1).unbind(-1)
    reached = [F.pad(k, (0, 0, 0, 0, lag, 0))[: len(k)] * (position >= lag)[:, None, None] for lag in range(len(taps))]
    return k + F.silu(torch.stack([tap * part for tap, part in zip(taps, reached, strict=True)]).sum(0))


def attention(
    p: dict[str, Tensor],
    name: str,
    model: ModelConfig,
    x: Tensor,
    position: Tensor,
    visible: Tensor,
    seen: Seen | None,
) -> Tensor:
    q, k, v = (
        (x @ p[f"{name}{part}.weight"].T).unflatten(-1, (-1, model.head_dim)) for part in ("query", "key", "value")
    )
    if model.key_convolution:
        k = convolved(k, p[name + "key_convolution.weight"], position)
    if model.qk_norm:
        q = rms(q, p[name + "query_norm.weight"], model.norm_epsilon)
        k = rms(k, p[name + "key_norm.weight"], model.norm_epsilon)
    q, k = (rotate(part, position, model.rope.base, model.rope.rotated) for part in (q, k))
    k, v = (part.repeat_interleave(model.heads // model.kv_heads, dim=1) for part in (k, v))
    if model.head_mixture.kind == "experts" and not model.head_mixture.own_keys:
        k, v = (part.repeat(1, model.head_mixture.count, 1) for part in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / model.head_dim**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    attended = torch.einsum("hts,shd->thd", weights, v)
    if model.head_mixture.kind != "none":
        assert seen is not None
        gates, chosen_by = head_gates(model, x @ p[name + "head_router.weight"].T, p[name + "bias"])
        attended = attended * gates.unsqueeze(-1)
        seen.heads.append(chosen_by)
    return attended.flatten(1) @ p[name + "out.weight"].T


def summed_loss(
    parameters: dict[str, Tensor], config: Config, sequence: PackedSequence, seen: Seen | None = None
) -> Tensor:
    """The decoder by its formulas, over one whole sequence; the sum of the losses of its labelled tokens."""
    model, p = config.model, parameters
    tokens, position, document = (torch.from_numpy(x) for x in (sequence.tokens, sequence.position, sequence.document))
    visible = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    x = p["embedding.weight"][tokens]
    for i in range(model.layers):
        name = f"blocks.{i}."
        normed = rms(x, p[name + "attention_norm.weight"], model.norm_epsilon)
        attended = (
            gated_recurrence(p, name + "attention.", model, normed, position, visible)
            if name + "attention.gate.weight" in p
            else attention(p, name + "attention.", model, normed, position, visible, seen)
        )
        x = x + attended
        if not model.parallel_blocks:
            normed = rms(x, p[name + "feed_forward_norm.weight"], model.norm_epsilon)
        if name + "feed_forward.router.weight" in p:
            assert seen is not None
            x = x + mixed(p, name + "feed_forward.", model.experts, normed, seen)
            continue
        gate, up = (normed @ p[f"{name}feed_forward.{part}.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ p[name + "feed_forward.down.weight"].T
    head = p["embedding.weight" if model.tied_embeddings else "head.weight"]
    logits = rms(x, p["norm.weight"], model.norm_epsilon) @ head.T
    return F.cross_entropy(logits, torch.from_numpy(sequence.labels), ignore_index=-100, reduction="sum")


def train_alone(config: Config, start: dict[str, Tensor]) -> Trajectory:
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optim = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() == 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    data, result = sequences(config), Trajectory([], [], [])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, STEPS)
        batch = [
            data.sequence(step * config.train.sequences_per_step + i) for i in range(config.train.sequences_per_step)
        ]
        count = sum(int((sequence.labels != -100).sum()) for sequence in batch)
        loss = torch.stack([summed_loss(parameters, config, sequence) for sequence in batch]).sum() / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), optim.max_gradient_norm)
        optimizer.step()
        result.losses.append(loss.item())
        result.norms.append(norm.item())
        result.gradients.append({name: p.grad.clone() for name, p in parameters.items()})  # pyright: ignore
    return result


def difference(a: Trajectory, b: Trajectory) -> float:
    """The largest difference in any loss, norm or gradient."""
    scalars = zip(a.losses + a.norms, b.losses + b.norms, strict=True)
    largest = max(abs(x - y) for x, y in scalars)
    for mine, other in zip(a.gradients, b.gradients, strict=True):
        assert mine.keys() == other.keys()
        largest = max(largest, *((mine[name] - other[name]).abs().max().item() for name in mine))
    return largest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("equivalence")
    return tiny.config(tiny.make_data(folder), folder / "run", ParallelConfig(strategy="single"))


@pytest.fixture(scope="module")
def alone(base: Config, ranks: Callable[[int], RankPool]) -> Trajectory:
    return train_alone(base, ranks(1).run(initial_parameters, base)[0])


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_ten_steps_do_not_depend_on_the_ranks(
    base: Config, alone: Trajectory, ranks: Callable[[int], RankPool], context: int, data: int, strategy: str
) -> None:
    config = replace(base, parallel=ParallelConfig(context=context, dp_shard=data, strategy=strategy))
    trajectories = ranks(context * data).run(train_dealt, config)
    assert len(set(trajectories[0].losses)) == STEPS
    for trajectory in trajectories:
        assert difference(trajectory, alone) <= TOLERANCE


@pytest.mark.parametrize("strategy", ["gather", "fetch", "double_ring", "hybrid", "hybrid_outer"])
def test_ten_steps_do_not_depend_on_the_strategy(
    base: Config, alone: Trajectory, ranks: Callable[[int], RankPool], strategy: str
) -> None:
    inner = 2 if STRATEGIES.get(strategy).refusal(Dense(), base.model.heads_of(Dense()), 4, 1) else 1
    parallel = ParallelConfig(context=4, context_inner=inner, strategy=strategy, layout="balanced")
    assert difference(ranks(4).run(train_dealt, replace(base, parallel=parallel))[2], alone) <= TOLERANCE


VARIANTS = {
    "replicas": lambda config: replace(config, parallel=ParallelConfig(context=2, dp_replicate=2)),
    "striped": lambda config: replace(config, parallel=ParallelConfig(context=4, layout="striped")),
    "recompute": lambda config: replace(
        config, parallel=ParallelConfig(context=4), train=replace(config.train, recompute="block")
    ),
    "key convolution": lambda config: tiny.with_model(
        replace(config, parallel=ParallelConfig(context=4)), key_convolution=3
    ),
    "tied, no qk norm, MQA": lambda config: tiny.with_model(
        replace(config, parallel=ParallelConfig(context=4)), tied_embeddings=True, qk_norm=False, kv_heads=1
    ),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_run(base: Config, ranks: Callable[[int], RankPool], variant: str) -> None:
    config: Config = VARIANTS[variant](base)
    single = replace(config, parallel=ParallelConfig(strategy="single"))
    truth = train_alone(single, ranks(1).run(initial_parameters, single)[0])
    assert difference(ranks(4).run(train_dealt, config)[3], truth) <= TOLERANCE


def test_bfloat16_compute_follows_float64_with_float32_masters(
    base: Config, alone: Trajectory, ranks: Callable[[int], RankPool]
) -> None:
    """Eight bits of mantissa: losses within 1 %, while parameters and gradients stay float32."""
    config = replace(base, parallel=ParallelConfig(context=2), train=replace(base.train, compute_dtype="bfloat16"))
    trajectory = ranks(2).run(train_dealt, config)[0]
    assert trajectory.losses == pytest.approx(alone.losses, rel=1e-2)
    assert trajectory.losses != alone.losses
    assert {gradient.dtype for gradient in trajectory.gradients[-1].values()} == {torch.float32}

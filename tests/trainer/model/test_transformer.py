"""The inputs of attention, against their formulas; attention itself only records them."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.layers.rope import YarnScaling
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.routing.router_logits import routing_logits
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.layout import Shards
from farspan.trainer.model import attention, experts, head_mixture
from farspan.trainer.model.attention import Attention, GatedRecurrence
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, ModelConfig, RopeConfig
from farspan.trainer.model.transformer import ExpertPlaces, SequenceContext, Transformer
from tests.kernels.layers.test_rope import scalar_frequency

CONFIG = ModelConfig(layers=1, width=12, heads=4, kv_heads=2, head_dim=6, feed_forward=8, vocabulary_size=16)


class Detached(NAtS):  # pyright: ignore[reportGeneralTypeIssues]
    """A router of three numbers whose gradient stops at its input."""

    routing_reads_detached = True


class Recorder:
    """Stands for the attention of a strategy; returns q."""

    def __init__(self) -> None:
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return inputs[0]


def recorded(mechanism: Mechanism, x: Tensor) -> tuple[Attention, tuple[Tensor, ...]]:
    """Return a layer and its inputs of attention for x, all at position 0."""
    layer, recorder = Attention(CONFIG, mechanism).double(), Recorder()
    cos = torch.ones(len(x), 3, dtype=torch.float64)
    inputs: Any = SimpleNamespace(cos=cos, sin=torch.zeros_like(cos), attention=recorder)
    layer(x, inputs)
    return layer, recorder.inputs


def test_without_a_router_attention_gets_three_inputs() -> None:
    attention, inputs = recorded(Dense(), torch.randn(5, 12, dtype=torch.float64))
    assert [tuple(x.shape) for x in inputs] == [(5, 4, 6), (5, 2, 6), (5, 2, 6)]
    assert attention.router is None


@pytest.mark.parametrize("mechanism", [MoSA(), Detached()], ids=["mosa", "detached"])
def test_a_router_reads_the_input_of_the_layer(mechanism: Mechanism) -> None:
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    attention, inputs = recorded(mechanism, x)
    assert attention.router is not None
    weight, routing = attention.router.weight, inputs[3]
    expected = torch.einsum("tc,hwc->thw", x, weight.view(2, mechanism.routing_width, 12))
    torch.testing.assert_close(routing, expected, rtol=1e-13, atol=1e-13)
    dx, dweight = torch.autograd.grad(routing.sum(), (x, weight), allow_unused=True)
    assert (dx is None) == mechanism.routing_reads_detached
    torch.testing.assert_close(dweight, x.sum(0).expand_as(weight))


# By compute dtype, the relative error of a result that is rounded once.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7.99)], ids=str
)
def test_a_part_of_each_head_rotates(dtype: torch.dtype, tolerance: float) -> None:
    """The first 4 numbers of 6, i with i + 2, at YaRN's frequencies for heads of 4; the others are as projected."""
    rope = RopeConfig(base=100.0, rotated=4, scaling="yarn", factor=4.0, original_positions=64, beta_fast=8.0)
    model, recorder = Transformer(replace(CONFIG, rope=rope), [Dense()]).to(dtype), Recorder()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    projected: list[Tensor] = []
    attention = model.blocks[0].attention
    assert isinstance(attention, Attention)
    keep: Any = lambda module, inputs, out: projected.append(out)  # noqa: E731
    attention.query.register_forward_hook(keep)
    attention.key.register_forward_hook(keep)

    rows, tokens = Rows.packed([3, 40]), torch.arange(43) % 16
    model(tokens, tokens, SequenceContext(rows=rows, attention=(recorder,)))  # pyright: ignore[reportArgumentType]
    scaling = YarnScaling(factor=4.0, original_positions=64, beta_fast=8.0)
    frequencies = torch.tensor([scalar_frequency(i, 4, 100.0, scaling) for i in range(2)], dtype=torch.float64)
    turn = torch.polar(
        torch.full((43, 2), scaling.table_factor(), dtype=torch.float64), rows.position[:, None] * frequencies
    )
    assert turn[-1, 1].angle().abs() > 0.1
    for raw, x_rotated in zip(projected, recorder.inputs, strict=False):
        x = raw.double().unflatten(-1, (-1, 6))
        rotated = torch.complex(x[..., :2], x[..., 2:4]) * turn[:, None]
        expected = torch.cat((rotated.real, rotated.imag, x[..., 4:]), dim=-1)
        assert x_rotated.dtype == dtype
        torch.testing.assert_close(x_rotated.double(), expected, rtol=tolerance, atol=min(tolerance, 1e-5))


@pytest.mark.parametrize("recurrent_layer", ["plain", "gated"])
def test_only_recurrences_are_gated_and_only_if_asked_for(recurrent_layer) -> None:
    config = replace(CONFIG, layers=3, recurrent_layer=recurrent_layer)
    model = Transformer(config, [Lightning(), Dense(), MoSA()])
    kinds = [type(block.attention) for block in model.blocks]
    assert kinds == [GatedRecurrence if recurrent_layer == "gated" else Attention, Attention, Attention]


EXPERTS = partial(ExpertsConfig, count=4, feed_forward=8)
CHOOSING: dict[str, tuple[Mechanism, dict[str, Any]]] = {
    "moba": (MoBA(block=4, top_k=2), {}),
    "nats": (NAtS(window=3), {}),
    "mosa": (MoSA(sparsity=4), {}),
    "mosa, causal choice": (MoSA(sparsity=4, causal_choice=True), {}),
    "experts": (Dense(), {"experts": EXPERTS()}),
    "experts, capacity": (Dense(), {"experts": EXPERTS(capacity=0.8)}),
    "experts, expert choice": (Dense(), {"experts": EXPERTS(choice="experts", normalized=False)}),
    "attention experts": (Dense(), {"head_mixture": HeadMixtureConfig(kind="experts", count=4, per_token=2)}),
    "mixture of heads": (Dense(), {"head_mixture": HeadMixtureConfig(kind="heads", shared=0, per_token=1)}),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_what_a_layer_chooses_serves_its_recomputation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are all equal but for noise in the pass that recomputes, by which it would choose all else."""
    mechanism, changed = CHOOSING[name]
    config, repeats, generator = replace(CONFIG, layers=2, **changed), False, torch.Generator().manual_seed(0)

    def disturb(x: Tensor) -> Tensor:
        return x + 1e-6 * torch.randn(x.shape, generator=generator, dtype=x.dtype) if repeats else x

    for place in (attention, experts, head_mixture):
        monkeypatch.setattr(place, "routing_logits", lambda *given: disturb(routing_logits(*given)))
    rotate = attention.rotate_queries_and_keys
    monkeypatch.setattr(attention, "rotate_queries_and_keys", lambda *given: [disturb(x) for x in rotate(*given)])

    rows, tokens = Rows.packed([20, 13]), torch.arange(33) % 16
    single = STRATEGIES.get("single")(Unconnected(0, 1))
    heads = config.heads_of(mechanism)
    planned = single.prepare(mechanism, Shards.build(rows, layout="contiguous", degree=1), heads, backend="cpu")
    places = ExpertPlaces(sequence=ExpertCapacity(Unconnected(0, 1), torch.arange(33)), channel=Unconnected(0, 1))
    gradients = []
    for recompute in (False, True):
        model, repeats = Transformer(config, [mechanism] * 2, recompute=recompute).double(), False
        for parameter_name, parameter in model.named_parameters():
            chooses = "router" in parameter_name or ("query" in parameter_name and isinstance(mechanism, MoBA))
            parameter.data.normal_(0.0, 0.0 if chooses else 0.3, generator=torch.Generator().manual_seed(1))
        for buffer in model.buffers():
            buffer.zero_()
        context = SequenceContext(rows=rows, attention=(planned, planned), experts=places)
        losses = model(tokens, tokens, context).losses
        repeats = True
        given = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
        gradients.append(given)
    for (parameter_name, _), first, again in zip(model.named_parameters(), *gradients, strict=True):
        assert (first - again).norm() <= 1e-4 * (1 + first.norm()), parameter_name

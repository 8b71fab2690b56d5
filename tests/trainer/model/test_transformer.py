"""What the model hands to attention, against its formulas; attention itself is a recorder."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.trainer.model.attention import Attention
from farspan.trainer.model.config import ModelConfig

CONFIG = ModelConfig(layers=1, width=12, heads=4, kv_heads=2, head_dim=6, feed_forward=8, vocabulary_size=16)


class Detached(MoSA):  # pyright: ignore[reportGeneralTypeIssues]
    """A router of three numbers that learns alone."""

    routing_width = 3
    routing_reads_detached = True


def handed_over(mechanism: Mechanism, x: Tensor) -> tuple[Attention, list[Tensor]]:
    """Return a layer and what it hands to attention for x, positions 0."""
    attention, handed = Attention(CONFIG, mechanism).double(), []

    def attend(*inputs: Tensor) -> Tensor:
        handed.extend(inputs)
        return inputs[0]

    turned = torch.ones(len(x), 3, dtype=torch.float64), torch.zeros(len(x), 3, dtype=torch.float64)
    inputs: Any = SimpleNamespace(cos=turned[0], sin=turned[1], attend=attend)
    attention(x, inputs)
    return attention, handed


def test_without_a_router_attention_gets_three_inputs() -> None:
    attention, handed = handed_over(Dense(), torch.randn(5, 12, dtype=torch.float64))
    assert [tuple(x.shape) for x in handed] == [(5, 4, 6), (5, 2, 6), (5, 2, 6)]
    assert attention.router is None


@pytest.mark.parametrize("mechanism", [MoSA(), Detached()], ids=["mosa", "detached"])
def test_a_router_reads_what_the_projections_read(mechanism: Mechanism) -> None:
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    attention, handed = handed_over(mechanism, x)
    assert attention.router is not None
    weight, routing = attention.router.weight, handed[3]
    expected = torch.einsum("tc,hwc->thw", x, weight.view(2, mechanism.routing_width, 12))
    torch.testing.assert_close(routing, expected, rtol=1e-13, atol=1e-13)
    dx, dweight = torch.autograd.grad(routing.sum(), (x, weight), allow_unused=True)
    assert (dx is None) == mechanism.routing_reads_detached
    torch.testing.assert_close(dweight, x.sum(0).expand_as(weight))

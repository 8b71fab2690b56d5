"""What is on record of experts' loads; losses and biases are tested in `test_experts.py`."""

import pytest
import torch

from farspan.trainer.load_balance import ExpertLoad


def test_summary_by_hand() -> None:
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    bias = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-0.5, 0.25, 0.25, 0.0], [0.1, 0.1, 0.1, 0.1]])
    found = ExpertLoad(
        counts=counts, dropped=torch.tensor([0, 4, 2]), balance_loss=0.5, z_loss=0.25, bias=bias
    ).summary("expert")
    assert found == {
        "expert_balance_loss": 0.5,
        "expert_z_loss": 0.25,
        "expert_dropped": {"0": 0.0, "1": 0.25, "2": 0.125},
        "expert_load": {"0": 1.0, "1": 4.0, "2": 2.0},
        "expert_entropy": {"0": pytest.approx(1.0), "1": pytest.approx(0.0), "2": pytest.approx(0.5)},
        "expert_bias": {"0": 0.0, "1": 0.75, "2": 0.0},
    }


def test_a_step_without_tokens_has_no_load() -> None:
    idle = torch.zeros(1, 4)
    found = ExpertLoad(counts=idle, dropped=idle[:, 0], balance_loss=0.0, z_loss=0.0, bias=idle).summary("expert")
    assert found["expert_load"] == {"0": 0.0}
    assert found["expert_entropy"] == {"0": 0.0}

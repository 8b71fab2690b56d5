"""AdamW and its learning-rate schedules; the rate is a function of the step and needs no saving."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from farspan.trainer.toml_config import bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101)."""

    learning_rate: float = bounded(3e-4, above=0)
    """The peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After a linear warm-up, `cosine` falls to final_fraction of the peak over the whole run, `wsd` (warm-up, stable,
    decay; arXiv 2404.06395) stays at the peak and falls linearly at the end."""
    warmup_steps: int = bounded(100, minimum=0)
    """Updates until the peak."""
    final_fraction: float = bounded(0.1, minimum=0, maximum=1)
    """The rate that the schedule approaches at the end, as a part of the peak."""
    decay_fraction: float = bounded(0.2, minimum=0, maximum=1)
    """The part of all updates in which `wsd` falls."""
    beta1: float = bounded(0.9, minimum=0, maximum=0.999999)
    """Decay of the running mean of the gradient."""
    beta2: float = bounded(0.95, minimum=0, maximum=0.999999)
    """Decay of the running mean of its square."""
    epsilon: float = bounded(1e-8, above=0)
    """Added to the denominator."""
    weight_decay: float = bounded(0.1, minimum=0)
    """Applied to matrices, not to norms."""
    max_gradient_norm: float = bounded(1.0, above=0, maximum=math.inf)
    """A longer gradient, of all parameters together, is scaled down to this norm; inf never scales."""

    def decay_steps(self, steps: int) -> int:
        """Return in how many of `steps` updates `wsd` falls."""
        return round(steps * self.decay_fraction)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters, sharded as they are, with a state that can be saved at once."""
    parameters = list(model.parameters())
    optimizer = build_adamw([(p, p.dim()) for p in parameters], config)
    add_state(optimizer, parameters)
    return optimizer


def build_adamw(parameters: Iterable[tuple[nn.Parameter, int]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW without state; parameters: each with its number of dimensions."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p, dimensions in parameters if dimensions > 1], "weight_decay": config.weight_decay},
        {"params": [p for p, dimensions in parameters if dimensions <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        # On a GPU one kernel updates all parameters, without temporary copies of them.
        fused=is_on_gpu([p for p, _ in parameters]) or None,
    )


def add_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Give each parameter its state before the first update, so that it can be saved and loaded."""
    is_fused = bool(optimizer.defaults["fused"])
    for parameter in parameters:
        # As AdamW does at its first update. Without it, torch makes the state that is saved or loaded before then with
        # an update of zero gradients, which counts, or leaves the state out where there are gradients.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def is_on_gpu(parameters: Sequence[nn.Parameter]) -> bool:
    return any(parameter.device.type == "cuda" for parameter in parameters)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of update `step` (from 0) of `steps`; the last one is a step away from the final rate."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    after, total = step - config.warmup_steps, max(steps - config.warmup_steps, 1)
    match config.schedule:
        case "cosine":
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * after / total))
        case "wsd":
            left, decay_steps = steps - step, config.decay_steps(steps)
            return peak if left >= decay_steps else final + (peak - final) * left / decay_steps


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate

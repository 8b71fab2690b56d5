"""FSDP2 of torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from farspan.parallel.fsdp import clip_gradients, sharding_bytes
from farspan.parallel.mesh import Mesh
from farspan.trainer.build import build_model
from farspan.trainer.config import Config
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.optim import build_optimizer


@dataclass(frozen=True, slots=True, eq=False)
class Fsdp2Engine:
    """A model whose parameters are DTensors, or plain in one process; gradients stay until the next step begins."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    max_gradient_norm: float = math.inf

    @property
    def wrapped(self) -> Transformer:
        return self.model

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, is_update: Callable[[Tensor], bool]) -> None:
        if is_update(clip_gradients(self.model.parameters(), self.max_gradient_norm)):
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        # Settings of the optimizer come from the configuration.
        return {"model": model, "optimizer": optimizer["state"]}

    def load_state(self, model: Mapping[str, Any], optimizer: Mapping[str, Any] | None = None) -> None:
        if optimizer is None:
            set_model_state_dict(self.model, dict(model))
            return
        _, current = get_state_dict(self.model, self.optimizer)
        state = {**current, "state": optimizer}
        set_state_dict(self.model, self.optimizer, model_state_dict=dict(model), optim_state_dict=state)  # pyright: ignore[reportArgumentType]

    def sharding_bytes(self, mesh: Mesh, dtype: torch.dtype, *, micro_batches: int, passes_ahead: int) -> int:
        return sharding_bytes(
            self.model, self.model.blocks, mesh, dtype, micro_batches=micro_batches, passes_ahead=passes_ahead
        )


def build_fsdp2(config: Config, mesh: Mesh, device: torch.device) -> Fsdp2Engine:
    model = build_model(config, mesh, device)
    return Fsdp2Engine(model, build_optimizer(model, config.optimizer), config.optimizer.max_gradient_norm)

"""What shards a model, reduces its gradients and updates it: the parts of a step and of a checkpoint that differ."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farspan.parallel.mesh import Mesh
from farspan.trainer.model.transformer import Transformer


class Engine(Protocol):
    """A model and its optimizer on the ranks of a run; every rank makes the same calls.

    model: for its layers and settings. wrapped: what is called in its place. optimizer: takes the learning rate.
    """

    @property
    def model(self) -> Transformer: ...
    @property
    def wrapped(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def zero_grad(self) -> None:
        """Begin a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch; the gradient of a step is the sum over ranks and micro-batches."""

    def step(self, is_update: Callable[[Tensor], bool]) -> None:
        """Clip the gradient and update the model, unless `is_update` says no to the norm before clipping.

        `is_update` is called once; the norm has the same bits on all ranks, and is not finite if the gradient is not.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has: `model`, tensors by name, and `optimizer`, the moments of each parameter.

        The same names and shapes for every engine, sharded in any way.
        """
        ...

    def load_state(self, model: Mapping[str, Any], optimizer: Mapping[str, Any] | None = None) -> None:
        """Take over tensors of a `state`; without `optimizer` its moments stay as they are."""

    def sharding_bytes(self, mesh: Mesh, dtype: torch.dtype, *, micro_batches: int, passes_ahead: int) -> int | None:
        """Return the bytes that a rank sends in a step for parameters and gradients; None where they are unknown."""

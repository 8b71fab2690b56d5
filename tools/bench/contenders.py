"""Contenders: the ways of computing attention on one device, farspan's backends and what torch and packages offer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, KernelRequest, choose_backend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from farspan.tools.bench.case import Attention, Shape

REFERENCE = "reference"
"""The backend that the others are checked against."""
SLACK = 4.0
"""Of errors of baselines: torch sums the gradients of a KV head's query heads in 16 bits."""


class NamedContender(ABC):
    """A way of computing attention, on one device or over ranks."""

    name: str
    packed: ClassVar[bool] = True
    """Whether it can compute packed documents."""
    is_baseline: ClassVar[bool] = True
    """Whether it is from outside of farspan."""

    @property
    def slack(self) -> float:
        """Return how many times the errors of our own it may have."""
        return SLACK if self.is_baseline else 1.0


def backend_for(mechanism: Mechanism, shape: Shape, name: str = "auto") -> str:
    """Return a backend that can do the work, or raise ConfigError."""
    return choose_backend(name, shape.device, KernelRequest.of(mechanism, shape.dtype, shape.head_dim, shape.value_dim))


class Contender(NamedContender):
    """One way of computing attention on one device."""

    @abstractmethod
    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        """Return differentiable attention over `rows`; raises ConfigError or ValueError where it can't compute it."""


@final
@dataclass(frozen=True, slots=True)
class Ours(Contender):
    """A backend of farspan, called as a model calls it: through the strategy of a single rank."""

    name: str
    is_baseline: ClassVar[bool] = False

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        backend_for(mechanism, shape, self.name)
        channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
        shards = Shards.build(rows, layout="contiguous", degree=1)
        return STRATEGIES.get("single")(channel).prepare(mechanism, shards, shape.heads, backend=self.name)


@final
@dataclass(frozen=True, slots=True)
class Sdpa(Contender):
    """torch's scaled_dot_product_attention by one of its kernels; dense causal attention over one document only.

    kernel: a name of SDPBackend, whose members cannot be sent to another process.
    """

    name: str
    kernel: str
    packed: ClassVar[bool] = False

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        one_document = bool((rows.document == 0).all()) and torch.equal(rows.position, torch.arange(len(rows)).int())
        if mechanism != Dense(causal=True) or not one_document:
            raise ConfigError(f"{self.name} computes dense causal attention over one document only.")
        return self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, self.kernel)):
            # [T, H, D] -> [1, H, T, D]
            query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)


def our_backends(device: torch.device, chosen: Sequence[str]) -> list[Ours]:
    """Return our backends: those `chosen`, or all that run on the device but the reference.

    Raises ConfigError for a backend that does not exist or cannot run here.
    """
    for name in chosen:
        if reason := BACKENDS.get(name).unavailable_reason(device):
            raise ConfigError(f"--backends {name} cannot run on {device.type}: {reason}.")
    able = [name for name, backend in BACKENDS.load().items() if backend.unavailable_reason(device) is None]
    return [Ours(name) for name in chosen or able if chosen or name != REFERENCE]

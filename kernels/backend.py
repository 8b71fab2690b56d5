"""Backend: what computes attention on one device; one file each in `backends/`."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from farspan.kernels.errors import ConfigError
from farspan.kernels.plan import Plan
from farspan.kernels.registry import Registry
from farspan.kernels.state import State
from farspan.kernels.stretch import Stretch


class Backend(ABC):
    """Computes softmax attention of rows to rows as a plan says, and scans if it can; forward and backward."""

    rank: int
    """Order in which `auto` tries the backends: the lowest rank that runs on the device is taken."""

    @abstractmethod
    def refusal(self, device: torch.device) -> str | None:
        """Return why this backend can't run on `device`, or None if it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """See `farspan.kernels.attend.attend`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `farspan.kernels.attend.attend_backward`."""

    def scan_refusal(self) -> str | None:
        """Return why this backend cannot scan, or None if it can; one that can has the two methods below."""
        return "it computes softmax attention only"

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, stretch: Stretch, decay: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `farspan.kernels.scan.scan`; a state is always given."""
        raise NotImplementedError(self.scan_refusal())

    def scan_backward(
        self,
        dout: Tensor,
        dstate: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stretch: Stretch,
        decay: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `farspan.kernels.scan.scan_backward`; both states are always given."""
        raise NotImplementedError(self.scan_refusal())


BACKENDS: Registry[Backend] = Registry("attention backend", "farspan.kernels.backends")


def choose_backend(name: str, device: torch.device) -> str:
    """Return the backend to use on `device`; `auto` takes the fastest that runs there.

    Raises ConfigError when the backend asked for does not exist or cannot run on the device.
    """
    if name != "auto":
        reason = BACKENDS.get(name).refusal(device)
        if reason is not None:
            raise ConfigError(f"attention.backend={name!r} cannot run on {device.type}: {reason}.")
        return name
    able = [(part.rank, key) for key, part in BACKENDS.load().items() if part.refusal(device) is None]
    return min(able)[1]

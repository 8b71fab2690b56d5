"""Backend: what computes attention on one device; one file each in `backends/`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.linear_attention.segment import Segment
from farspan.kernels.linear_attention.state import State
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planning.plan import Plan
from farspan.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRequest:
    """What backends differ in being able to compute.

    chooses_keys: whether keys are chosen by content, or die. scans: whether it is a recurrence instead of a softmax.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    chooses_keys: bool
    scans: bool

    @staticmethod
    def of(mechanism: Mechanism, dtype: torch.dtype, head_dim: int, value_dim: int) -> "KernelRequest":
        """Return what a mechanism asks of a backend."""
        return KernelRequest(
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            chooses_keys=not mechanism.accesses.isdisjoint({Access.BLOCKS, Access.LIFETIMES}),
            scans=Access.STATE in mechanism.accesses,
        )


class Backend(ABC):
    """Computes softmax attention of rows to rows as a plan says, and scans if it can; forward and backward."""

    rank: int
    """Order in which `auto` tries the backends: the lowest rank that runs on the device is taken."""
    deterministic: bool = True
    """Whether the same inputs give the same bits every time."""

    @abstractmethod
    def unsupported_reason(self, device: torch.device) -> str | None:
        """Return why this backend can't run on `device`, or None if it can."""

    def calls(self) -> str:
        """Return the libraries that it calls on this machine, for people to read; nothing if it is all our own."""
        return ""

    def limit(self, work: KernelRequest) -> str | None:
        """Return why this backend can't compute `work` on any device, or None if it can."""
        return None

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """See `farspan.kernels.attention.attend`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `farspan.kernels.attention.attention_backward`."""

    def scan_unsupported_reason(self) -> str | None:
        """Return why this backend cannot scan, or None if it can; one that can has the two methods below."""
        return "it computes softmax attention only"

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, segment: Segment, decay: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """See `farspan.kernels.recurrent_attention.scan`; a state is always given."""
        raise NotImplementedError(self.scan_unsupported_reason())

    def scan_backward(
        self,
        dout: Tensor,
        dstate: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment: Segment,
        decay: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `farspan.kernels.recurrent_attention.scan_backward`; both states are always given."""
        raise NotImplementedError(self.scan_unsupported_reason())


BACKENDS: Registry[Backend] = Registry("attention backend", "farspan.kernels.backends")


def choose_backend(name: str, device: torch.device, work: KernelRequest) -> str:
    """Return the backend to use on `device`; `auto` takes the fastest that can do the work there.

    Raises ConfigError when the backend asked for does not exist, cannot run on the device or cannot do the work.
    """
    able = {key: part.rank for key, part in BACKENDS.load().items() if _refusal(part, device, work) is None}
    if name == "auto":
        return min(able, key=lambda key: able[key])
    reason = _refusal(BACKENDS.get(name), device, work)
    if reason is not None:
        raise ConfigError(
            f"attention.backend={name!r} cannot run on {device.type}: {reason}; these can: {', '.join(able)}."
        )
    return name


def _refusal(backend: Backend, device: torch.device, work: KernelRequest) -> str | None:
    return (
        backend.unsupported_reason(device)
        or backend.limit(work)
        or (backend.scan_unsupported_reason() if work.scans else None)
    )

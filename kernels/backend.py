"""Backend: an implementation of attention on one device; one file each in `backends/`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.lifetimes import gradient
from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRequest:
    """The properties of a layer that not every backend supports.

    selects_keys: whether keys are selected by content, or expire. is_windowed: whether queries see a part of their
    document by positions alone. is_recurrent: whether it is a recurrence and not softmax attention.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    selects_keys: bool
    is_windowed: bool
    is_recurrent: bool

    @staticmethod
    def of(mechanism: Mechanism, dtype: torch.dtype, head_dim: int, value_dim: int) -> "KernelRequest":
        return KernelRequest(
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            selects_keys=not mechanism.accesses.isdisjoint({Access.BLOCKS, Access.LIFETIMES}),
            is_windowed=mechanism.is_windowed,
            is_recurrent=Access.STATE in mechanism.accesses,
        )


class Backend(ABC):
    """Computes softmax attention of rows to rows by a plan, forward and backward.

    One that runs recurrent mechanisms too is a `RecurrentBackend` as well.
    """

    rank: int
    """Order in which `auto` tries the backends: the lowest rank that runs on the device is taken."""
    note: str = ""
    """What the summary of a run says about how it computes."""
    deterministic: bool = True
    """Whether the same inputs give the same bits every time."""
    dtypes: tuple[torch.dtype, ...] = ()
    """The dtypes that it takes; empty: all of float64 to float16."""
    widest: float = float("inf")
    """Largest head size that it takes."""
    packs_selections: bool = False
    """Whether it takes block selections as bits, made on the device of the queries, instead of lists on the CPU."""

    @abstractmethod
    def unavailable_reason(self, device: torch.device) -> str | None:
        """Return why this backend can't run on `device`, or None if it can."""

    def unsupported_reason(self, request: KernelRequest) -> str | None:
        """Return why this backend can't compute `request` on any device, or None if it can."""
        if self.dtypes and request.dtype not in self.dtypes:
            *names, last, refused = (str(dtype).removeprefix("torch.") for dtype in (*self.dtypes, request.dtype))
            return f"it takes {', '.join(names)} and {last}, not {refused}"
        if (width := max(request.head_dim, request.value_dim)) > self.widest:
            return f"it takes head sizes up to {self.widest}, not {width}"
        return None

    def slow_reason(self, request: KernelRequest) -> str | None:
        """Return why `auto` prefers any other backend, but the reference, for a request that this one can compute."""
        return None

    def check(self, name: str, q: Tensor, v: Tensor, *, selects_keys: bool) -> None:
        """Raise ConfigError where this backend, of that name, can't compute q `[T, Hq, D]` and v `[S, Hk, Dv]`."""
        request = KernelRequest(
            dtype=q.dtype,
            head_dim=q.shape[2],
            value_dim=v.shape[2],
            selects_keys=selects_keys,
            is_windowed=False,
            is_recurrent=False,
        )
        if reason := self.unsupported_reason(request):
            raise ConfigError(
                f"attention.backend={name!r} cannot compute this: {reason}; use attention.backend='auto'."
            )

    def calls(self) -> str:
        """Return the names of the libraries that it calls on this machine; nothing if all kernels are our own."""
        return ""

    def prepare(self, plan: Plan, spec: InputSpec) -> None:
        """Make what both passes need of a plan but for what depends on content, ahead of them; here nothing."""
        return

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """See `farspan.kernels.attention.attention_forward`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `farspan.kernels.attention.attention_backward`."""

    def choices(self, plan: Plan, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Return each choice of a plan with a selection: row * heads + head, and the block, int64 `[choices]`.

        On the device of the selection, where the host does not know their number: as many as there may be, of which
        those with the number of blocks for a block are none.
        """
        assert plan.selection is not None
        return plan.selection.as_lists.choices(plan.heads)

    def prepare_choices(self, plan: Plan, device: torch.device) -> None:
        """Make what `choices` of selections such as the plan's needs on `device`, ahead of them."""
        return

    def pair_sums(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        causal_lse: Tensor,
        *,
        plan: Plan,
        lifetimes: Lifetimes,
    ) -> tuple[Tensor, Tensor]:
        """See `farspan.kernels.lifetimes.gradient.pair_sums`."""
        return gradient.pair_sums(dout, q, k, v, out, causal_lse, plan=plan, lifetimes=lifetimes)

    def type_gradient(self, sums: Tensor, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
        """See `farspan.kernels.lifetimes.gradient.type_gradient`."""
        return gradient.type_gradient(sums, lifetimes, order)


SLOW = 30
"""Added to the rank of a slow backend: it comes after all others but the reference."""
BACKENDS: Registry[Backend] = Registry("attention backend", "farspan.kernels.backends")


def choose_backend(name: str, device: torch.device, request: KernelRequest) -> str:
    """Return the backend to use on `device`; `auto` takes the fastest that supports the request there.

    Raises ConfigError when the backend asked for does not exist, is unavailable or does not support the request.
    """
    able = [key for key, part in BACKENDS.load().items() if _reason(part, device, request) is None]
    if name == "auto":
        return min(able, key=lambda key: _rank(BACKENDS.get(key), request))
    reason = _reason(BACKENDS.get(name), device, request)
    if reason is not None:
        raise ConfigError(
            f"attention.backend={name!r} cannot run on {device.type}: {reason}; these can: {', '.join(able)}."
        )
    return name


def why_not_before(name: str, device: torch.device, request: KernelRequest) -> dict[str, str]:
    """Return the backends of this device that `auto` tries before `name`, and why it takes none of them."""
    others = {key: part for key, part in BACKENDS.load().items() if part.unavailable_reason(device) is None}
    reasons = {
        key: _reason(part, device, request) or part.slow_reason(request)
        for key, part in others.items()
        if part.rank < BACKENDS.get(name).rank
    }
    return {key: reason for key, reason in reasons.items() if reason is not None}


def _rank(backend: Backend, request: KernelRequest) -> int:
    return backend.rank if backend.slow_reason(request) is None else backend.rank + SLOW


def _reason(backend: Backend, device: torch.device, request: KernelRequest) -> str | None:
    if reason := backend.unavailable_reason(device) or backend.unsupported_reason(request):
        return reason
    if request.is_recurrent and not isinstance(backend, RecurrentBackend):
        return "it has softmax attention only"
    return None

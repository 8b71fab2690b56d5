"""What is measured: one mechanism over one sequence, of one shape, computed by one contender."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from farspan.registry import nearest_name_hint

BASELINE = "dense"
"""Row that all others are compared with: dense causal attention over one document."""
PACKED = "_varlen"
"""What the name of a row ends with when it is measured over packed documents."""

Attention = Callable[..., Tensor]
"""From q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]` and routing, if there is a router, to out `[T, Hq, Dv]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all that is compared has in common, but for the number of tokens."""

    heads: Heads
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    def exact(self) -> "Shape":
        """Return the same shape in float64."""
        return replace(self, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row of the table: a mechanism with its options, over one document or over packed ones."""

    name: str
    mechanism: Mechanism
    packed: bool = False

    def rows(self, tokens: int) -> Rows:
        """Return the rows of its sequence."""
        return Rows.packed(document_lengths(tokens) if self.packed else [tokens])


def document_lengths(tokens: int) -> list[int]:
    """Return lengths of documents that fill `tokens`: uniform up to a quarter of it, the same at every call."""
    generator, left, lengths = torch.Generator().manual_seed(0), tokens, []
    while left:
        drawn = int(torch.randint(1, max(tokens // 4, 1) + 1, (1,), generator=generator))
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


def unmasked_share(mechanism: Mechanism, rows: Rows) -> float:
    """Return the visible pairs over those of dense causal attention of the same rows."""
    return mechanism.unmasked_pairs(rows, rows) / Dense().unmasked_pairs(rows, rows)


def inputs_of(mechanism: Mechanism, tokens: int, shape: Shape, *, seed: int = 0) -> list[Tensor]:
    """Return normal q, k, v and, for a mechanism with a router, routing; leaves that require gradients."""
    generator = torch.Generator(shape.device).manual_seed(seed)

    def draw(heads: int, width: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float32, device=shape.device)
        return x.to(dtype).requires_grad_()

    heads, dtype = shape.heads, shape.dtype
    inputs = [draw(heads.query, shape.head_dim, dtype), draw(heads.kv, shape.head_dim, dtype)]
    inputs.append(draw(heads.kv, shape.value_dim, dtype))
    if mechanism.routing_width:
        inputs.append(draw(heads.kv, mechanism.routing_width, accumulation_dtype(dtype)))
    return inputs


def gradient_of_out(tokens: int, shape: Shape) -> Tensor:
    """Return a normal gradient of out, `[tokens, Hq, Dv]`."""
    generator = torch.Generator(shape.device).manual_seed(1)
    size = (tokens, shape.heads.query, shape.value_dim)
    return torch.randn(size, generator=generator, dtype=torch.float32, device=shape.device).to(shape.dtype)


class Contender(ABC):
    """One way of computing attention."""

    name: str
    packed: ClassVar[bool] = True
    """Whether it can compute packed documents."""

    @abstractmethod
    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        """Return differentiable attention over `rows`; raises ConfigError or ValueError where it can't compute it."""


@final
@dataclass(frozen=True, slots=True)
class Ours(Contender):
    """A backend of farspan, called as a model calls it: through the strategy of a single rank."""

    name: str

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        choose_backend(
            self.name, shape.device, KernelRequest.of(mechanism, shape.dtype, shape.head_dim, shape.value_dim)
        )
        channel = Channel(dist.group.WORLD, Traffic())  # pyright: ignore[reportArgumentType]
        shards = Shards.build(rows, layout="contiguous", degree=1)
        return STRATEGIES.get("single")(channel).prepare(mechanism, shards, shape.heads, backend=self.name)


def find_cases(names: Sequence[str], varlen: Sequence[str]) -> list[Case]:
    """Return a case for each mechanism of the registry, or for those in `names`: mechanisms, or rows of one.

    The baseline comes first, always. Names in `varlen` are measured over packed documents too. Raises ConfigError for
    an unknown name.
    """
    rows: dict[str, list[Case]] = {}
    for name, cls in MECHANISMS.load().items():
        instances = cls.benchmarks() or {name: cls.examples()[0]}
        rows[name] = [Case(name=row, mechanism=mechanism) for row, mechanism in instances.items()]
    by_name = {case.name: [case] for cases in rows.values() for case in cases} | rows
    cases = {BASELINE: Case(name=BASELINE, mechanism=Dense())}
    for name in (*(names or rows), *varlen):
        if name not in by_name:
            hint = nearest_name_hint(name, list(by_name))
            raise ConfigError(f"mechanism {name!r} does not exist; choose from {', '.join(sorted(by_name))}.{hint}")
    for name in names or rows:
        for case in by_name[name]:
            cases[case.name] = case
            if case.name in varlen:
                cases[case.name + PACKED] = replace(case, name=case.name + PACKED, packed=True)
    return sorted(cases.values(), key=lambda case: case.name != BASELINE)

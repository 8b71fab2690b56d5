"""Attention that is measured: one mechanism over one sequence, of one shape.

Legend: T tokens, Hq query heads, Hk KV heads, D head dim, Dv value head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.merge import accumulation_dtype
from farspan.registry import nearest_name_hint

BASELINE = "dense"
"""The case that all others are compared with: dense causal attention over one document."""
PACKED = "_varlen"
"""Suffix of cases over packed documents."""

Attention = Callable[..., Tensor]
"""From q `[T, Hq, D]`, k `[T, Hk, D]`, v `[T, Hk, Dv]` and routing, if there is a router, to out `[T, Hq, Dv]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Heads, head dims, dtype and device: the same for everything that is compared."""

    heads: Heads
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.heads.query}:{self.heads.kv} heads of {self.head_dim}, {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A mechanism with its options, over one document or over packed ones."""

    name: str
    mechanism: Mechanism
    packed: bool = False

    def rows(self, tokens: int) -> Rows:
        return Rows.packed(document_lengths(tokens) if self.packed else [tokens])

    def unmasked_pairs(self, tokens: int) -> int:
        return self.mechanism.unmasked_pairs(self.rows(tokens))


def document_lengths(tokens: int) -> list[int]:
    """Return lengths of documents that fill `tokens`: uniform up to a quarter of it, the same at every call."""
    generator, left, lengths = torch.Generator().manual_seed(0), tokens, []
    while left:
        drawn = int(torch.randint(1, max(tokens // 4, 1) + 1, (1,), generator=generator))
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


def unmasked_share(mechanism: Mechanism, rows: Rows) -> float:
    """Return the unmasked pairs over those of dense causal attention of the same rows."""
    return mechanism.unmasked_pairs(rows) / Dense().unmasked_pairs(rows)


def inputs_of(mechanism: Mechanism, tokens: int, shape: Shape, *, seed: int = 0) -> list[Tensor]:
    """Return normal q, k, v and, for a mechanism with a router, routing; leaves that require gradients."""
    generator, heads, dtype = torch.Generator(shape.device).manual_seed(seed), shape.heads, shape.dtype
    wanted = [
        (heads.query, shape.head_dim, dtype),
        (heads.kv, shape.head_dim, dtype),
        (heads.kv, shape.value_dim, dtype),
    ]
    if mechanism.routing_width:
        wanted.append((heads.kv, mechanism.routing_width, accumulation_dtype(dtype)))
    inputs = []
    for number, width, of_input in wanted:
        x = torch.randn(tokens, number, width, generator=generator, device=shape.device)
        inputs.append(x.to(of_input).requires_grad_())
    return inputs


def gradient_of_out(tokens: int, shape: Shape) -> Tensor:
    """Return a normal gradient of out, `[T, Hq, Dv]`."""
    generator = torch.Generator(shape.device).manual_seed(1)
    size = (tokens, shape.heads.query, shape.value_dim)
    return torch.randn(size, generator=generator, device=shape.device).to(shape.dtype)


def find_cases(names: Sequence[str], varlen: Sequence[str]) -> list[Case]:
    """Return the cases of all mechanisms, or of those in `names`: mechanisms, or single cases; the baseline first.

    Cases in `varlen` are measured over packed documents too. Raises ConfigError for an unknown name.
    """
    cases: dict[str, list[Case]] = {}
    for name, cls in MECHANISMS.load().items():
        instances = cls.benchmarks() or {name: cls.examples()[0]}
        cases[name] = [Case(name=case, mechanism=mechanism) for case, mechanism in instances.items()]
    by_name = {case.name: [case] for of_mechanism in cases.values() for case in of_mechanism} | cases
    found = {BASELINE: Case(name=BASELINE, mechanism=Dense())}
    for name in (*(names or cases), *varlen):
        known(name, "mechanism", by_name)
    for name in names or cases:
        for case in by_name[name]:
            found[case.name] = case
            if case.name in varlen:
                found[case.name + PACKED] = replace(case, name=case.name + PACKED, packed=True)
    return list(found.values())


def known(name: str, kind: str, choices: Sequence[str] | dict[str, list[Case]]) -> str:
    """Return the name; raises ConfigError where it is none of the choices."""
    if name not in choices:
        hint = nearest_name_hint(name, list(choices))
        raise ConfigError(f"{kind} {name!r} does not exist; choose from {', '.join(sorted(choices))}.{hint}")
    return name

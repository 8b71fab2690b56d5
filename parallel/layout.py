"""Layouts: which rank holds which tokens of a sequence, as an index map; strategies work under any of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.errors import ConfigError
from farspan.kernels.registry import nearest_name_hint
from farspan.kernels.rows import Rows


def contiguous(tokens: int, degree: int) -> Tensor:
    """Rank r holds the r-th stretch. Causal work is uneven: the last rank does almost twice the mean."""
    return _chunks(tokens, degree)


def zigzag(tokens: int, degree: int) -> Tensor:
    """Of 2 * degree stretches rank r holds the r-th and the r-th from the end: causal work is even."""
    chunks = _chunks(tokens, 2 * degree)
    return torch.cat((chunks[:degree], chunks[degree:].flip(0)), dim=1)


def striped(tokens: int, degree: int) -> Tensor:
    """Rank r holds tokens r, r + degree, ... (arXiv 2311.09431): causal work is even at every step of a ring."""
    return _chunks(tokens, degree, interleaved=True)


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def _chunks(tokens: int, count: int, *, interleaved: bool = False) -> Tensor:
    """Deal tokens to `count` equal chunks, int64 `[count, ceil(tokens / count)]`; -1 fills up the last ones."""
    length = -(-tokens // count)
    index = torch.arange(count * length)
    index = index.view(length, count).t() if interleaved else index.view(count, length)
    return index.masked_fill(index >= tokens, -1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shards:
    """One sequence dealt to the ranks of a context-parallel group.

    rows: of the whole sequence, in order, on the CPU; every rank knows them all.
    index: int64 `[degree, tokens_local]`, the token of the sequence behind each local row; -1 is padding.
    """

    rows: Rows
    index: Tensor

    @staticmethod
    def deal(rows: Rows, *, layout: str, degree: int) -> "Shards":
        """Deal `rows` to `degree` ranks; raises ConfigError for an unknown layout."""
        if layout not in LAYOUTS:
            hint = nearest_name_hint(layout, list(LAYOUTS))
            raise ConfigError(f"parallel.layout={layout!r} does not exist; choose one of {', '.join(LAYOUTS)}.{hint}")
        return Shards(rows=rows, index=LAYOUTS[layout](len(rows), degree))

    @property
    def degree(self) -> int:
        return self.index.shape[0]

    @property
    def tokens_local(self) -> int:
        return self.index.shape[1]

    def rows_of(self, rank: int) -> Rows:
        """Return the rows that `rank` holds, in its order."""
        return self.rows.take(self.index[rank])

    def shard(self, x: Tensor, rank: int, *, fill: int | float = 0) -> Tensor:
        """Return the part of `x` `[tokens, ...]` that `rank` holds, `[tokens_local, ...]`; padding is `fill`."""
        index = self.index[rank].to(x.device)
        absent = (index < 0).view(-1, *[1] * (x.dim() - 1))
        return x[index.clamp(min=0)].masked_fill(absent, fill)

    def unshard(self, parts: Tensor) -> Tensor:
        """Return `[tokens, ...]` in order from all ranks' parts `[degree, tokens_local, ...]`, padding dropped."""
        return parts.flatten(0, 1)[self.order()[: len(self.rows)].to(parts.device)]

    def order(self) -> Tensor:
        """Return where each token of the sequence, then each padding row, lies in the ranks' rows set end to end."""
        index = self.index.flatten()
        return index.masked_fill(index < 0, len(self.rows)).argsort(stable=True)

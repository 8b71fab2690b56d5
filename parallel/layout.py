"""Layouts: which rank holds which tokens of a sequence, as an index map; strategies work under any of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.attention_mask import AttentionMask, count_keys_per_query
from farspan.kernels.masks.rows import Rows
from farspan.registry import nearest_name_hint

TokenWork = Callable[[], Tensor]
"""The work of each token, float64 `[tokens]`, asked for where it matters only."""


def contiguous(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Rank r holds the r-th stretch. Causal work is uneven: the last rank does almost twice the mean."""
    return equal_chunks(tokens, degree)


def zigzag(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Of 2 * degree stretches rank r holds the r-th and the r-th from the end: causal work is even."""
    chunks = equal_chunks(tokens, 2 * degree)
    return torch.cat((chunks[:degree], chunks[degree:].flip(0)), dim=1)


def striped(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Rank r holds tokens r, r + degree, ... (arXiv 2311.09431): causal work is even at every step of a ring."""
    return equal_chunks(tokens, degree, interleaved=True)


def balanced(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Short stretches, as many for each rank, dealt so that the work of all ranks is even, whatever it is.

    As few stretches as do it, since each costs calls: twice as many until the busiest rank has EVEN times the mean, or
    stretches are SHORTEST tokens.
    """
    of_token, each = work(), 2
    index, imbalance = _deal_chunks(of_token, degree, each)
    while imbalance > EVEN and tokens >= 2 * each * degree * SHORTEST:
        each *= 2
        index, imbalance = _deal_chunks(of_token, degree, each)
    return index


LAYOUTS: dict[str, Callable[[int, int, TokenWork], Tensor]] = {
    "balanced": balanced,
    "contiguous": contiguous,
    "striped": striped,
    "zigzag": zigzag,
}
EVEN = 1.01
"""Most work of any rank over the mean that is good enough."""
SHORTEST = 128
"""Tokens of a stretch: attention in shorter pieces is slow."""
SWAPS, EVEN_ENOUGH = 200, 1.001
"""Most swaps that even out what is dealt, and what is not worth one more."""


def equal_chunks(tokens: int, count: int, *, interleaved: bool = False) -> Tensor:
    """Deal tokens to `count` equal chunks, int64 `[count, ceil(tokens / count)]`; -1 fills up the last ones."""
    length = -(-tokens // count)
    index = torch.arange(count * length)
    index = index.view(length, count).t() if interleaved else index.view(count, length)
    return index.masked_fill(index >= tokens, -1)


def _deal_chunks(work: Tensor, degree: int, each: int) -> tuple[Tensor, float]:
    """Deal `each` chunks to every rank; return the index map, and the most work of a rank over the mean."""
    chunks = equal_chunks(len(work), degree * each)
    of_chunk = torch.cat((work, work.new_zeros(chunks.numel() - len(work)))).view(chunks.shape).sum(dim=1).numpy()
    dealt = _even_out(of_chunk, _greedy(of_chunk, degree))
    loads = of_chunk[dealt].sum(axis=1)
    order = torch.from_numpy(np.sort(dealt, axis=1))
    return chunks[order].flatten(1), float(loads.max() * degree / max(loads.sum(), 1.0))


def _greedy(work: np.ndarray, degree: int) -> np.ndarray:
    """Deal chunks in rounds, the heaviest left first, to the ranks that have least so far; int64 `[degree, rounds]`."""
    rounds = (-work).argsort(kind="stable").reshape(-1, degree)
    dealt, loads = np.empty((degree, len(rounds)), dtype=np.int64), np.zeros(degree)
    for number, chunks in enumerate(rounds):
        lightest = loads.argsort(kind="stable")
        dealt[lightest, number] = chunks
        loads[lightest] += work[chunks]
    return dealt


def _even_out(work: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """Swap chunks of the rank that has most with such of others, as long as that makes the most less."""
    loads = work[dealt].sum(axis=1)
    for _ in range(SWAPS):
        heavy = int(loads.argmax())
        if loads[heavy] <= EVEN_ENOUGH * loads.mean():
            break
        # What every swap with a chunk of any rank would leave the heavier of both with.
        change = work[dealt[heavy]][:, None, None] - work[dealt]
        worst = np.maximum(loads[heavy] - change, loads[:, None] + change)
        worst[:, heavy] = np.inf
        mine, rank, theirs = np.unravel_index(worst.argmin(), worst.shape)
        if worst[mine, rank, theirs] >= loads[heavy]:
            break
        moved = change[mine, rank, theirs]
        loads[heavy] -= moved
        loads[rank] += moved
        dealt[heavy, mine], dealt[rank, theirs] = dealt[rank, theirs], dealt[heavy, mine]
    return dealt


def causal_keys(rows: Rows) -> Tensor:
    """The work of tokens that attend to all before them."""
    return count_keys_per_query(AttentionMask(causal=True), rows)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shards:
    """One sequence dealt to the ranks of a context-parallel group.

    rows: of the whole sequence, in order, on the CPU; every rank knows them all.
    index: int64 `[degree, tokens_local]`, the token of the sequence behind each local row; -1 is padding.
    """

    rows: Rows
    index: Tensor

    @staticmethod
    def deal(rows: Rows, *, layout: str, degree: int, work: Callable[[Rows], Tensor] = causal_keys) -> "Shards":
        """Deal `rows` to `degree` ranks; raises ConfigError for an unknown layout.

        work: of each token, as `Mechanism.keys_per_query` has it; dense causal attention if not given.
        """
        if layout not in LAYOUTS:
            hint = nearest_name_hint(layout, list(LAYOUTS))
            raise ConfigError(f"parallel.layout={layout!r} does not exist; choose one of {', '.join(LAYOUTS)}.{hint}")
        return Shards(rows=rows, index=LAYOUTS[layout](len(rows), degree, lambda: work(rows)))

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

    def places(self) -> Tensor:
        """Return where each token of the sequence lies in the ranks' rows set end to end, int64 `[tokens]`."""
        index = self.index.flatten()
        places = torch.empty(len(self.rows), dtype=torch.int64)
        places[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        return places

    def order(self) -> Tensor:
        """Return where each token of the sequence, then each padding row, lies in the ranks' rows set end to end."""
        index = self.index.flatten()
        return index.masked_fill(index < 0, len(self.rows)).argsort(stable=True)

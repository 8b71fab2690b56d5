"""Layouts: which rank holds which tokens of a sequence, as an index map; strategies work under any of them.

Eight tokens on two ranks, P = 2 (`balanced` depends on the work of each token):

    contiguous   rank 0: 0 1 2 3   rank 1: 4 5 6 7     rank 1 sees more keys under a causal mask
    zigzag       rank 0: 0 1 6 7   rank 1: 2 3 4 5     2P chunks, rank r has chunks r and 2P-1-r
    striped      rank 0: 0 2 4 6   rank 1: 1 3 5 7     token t is on rank t mod P
"""

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
"""Computes the work of each token, float64 `[tokens]`; only layouts that depend on it call it."""


def contiguous(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Rank r holds the r-th chunk. Causal work is uneven: the last rank does almost twice the mean."""
    return equal_chunks(tokens, degree)


def zigzag(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Rank r holds the r-th of 2P chunks from the start and the r-th from the end: causal work is even."""
    chunks = equal_chunks(tokens, 2 * degree)
    return torch.cat((chunks[:degree], chunks[degree:].flip(0)), dim=1)  # 2 x [P, T/2] -> [P, T]


def striped(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Rank r holds tokens r, r + P, ... (arXiv 2311.09431): causal work is even at every step of a ring."""
    return equal_chunks(tokens, degree, interleaved=True)


def balanced(tokens: int, degree: int, work: TokenWork) -> Tensor:
    """Assign as many short chunks to each rank, so that all ranks have the same work under any mask."""
    # Few chunks, since each costs kernel calls: their number doubles until the busiest rank has at most MAX_IMBALANCE
    # times the mean, or chunks have MIN_CHUNK_TOKENS.
    token_work, chunks_per_rank = work(), 2
    index, imbalance = _assign_chunks(token_work, degree, chunks_per_rank)
    while imbalance > MAX_IMBALANCE and tokens >= 2 * chunks_per_rank * degree * MIN_CHUNK_TOKENS:
        chunks_per_rank *= 2
        index, imbalance = _assign_chunks(token_work, degree, chunks_per_rank)
    return index


LAYOUTS: dict[str, Callable[[int, int, TokenWork], Tensor]] = {
    layout.__name__: layout for layout in (balanced, contiguous, striped, zigzag)
}
MAX_IMBALANCE = 1.01
"""Most work of any rank over the mean that is good enough."""
MIN_CHUNK_TOKENS = 128
"""Attention of shorter chunks is slow."""
MAX_SWAPS, SWAP_IMBALANCE = 200, 1.001
"""Swaps of chunks end after this many, or once the busiest rank is this close to the mean."""


def equal_chunks(tokens: int, count: int, *, interleaved: bool = False) -> Tensor:
    """Split tokens into `count` equal chunks, int64 `[count, ceil(tokens / count)]`; -1 pads the last ones."""
    length = -(-tokens // count)
    index = torch.arange(count * length)
    # [count * length] -> [count, length]
    index = index.view(length, count).t() if interleaved else index.view(count, length)
    return index.masked_fill(index >= tokens, -1)


def _assign_chunks(work: Tensor, degree: int, chunks_per_rank: int) -> tuple[Tensor, float]:
    """Assign chunks to every rank; return the index map, and the most work of a rank over the mean."""
    chunks = equal_chunks(len(work), degree * chunks_per_rank)
    padded = torch.cat((work, work.new_zeros(chunks.numel() - len(work))))
    chunk_work = padded.view(chunks.shape).sum(dim=1).numpy()  # [tokens] -> [chunks, length] -> [chunks]
    assigned = _swap_chunks(chunk_work, _assign_greedily(chunk_work, degree))
    rank_work = chunk_work[assigned].sum(axis=1)  # [P, chunks per rank] -> [P]
    order = torch.from_numpy(np.sort(assigned, axis=1))
    # [P, chunks per rank, length] -> [P, T]
    return chunks[order].flatten(1), float(rank_work.max() * degree / max(rank_work.sum(), 1.0))


def _assign_greedily(work: np.ndarray, degree: int) -> np.ndarray:
    """Assign a chunk to each rank per round, the heaviest to the rank with least so far; int64 `[P, rounds]`."""
    rounds = (-work).argsort(kind="stable").reshape(-1, degree)  # [chunks] -> [rounds, P]
    assigned, rank_work = np.empty((degree, len(rounds)), dtype=np.int64), np.zeros(degree)
    for number, chunks in enumerate(rounds):
        lightest_first = rank_work.argsort(kind="stable")
        assigned[lightest_first, number] = chunks
        rank_work[lightest_first] += work[chunks]
    return assigned


def _swap_chunks(work: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """Swap chunks of the busiest rank with chunks of other ranks, as long as that lowers the maximum."""
    rank_work = work[assigned].sum(axis=1)
    for _ in range(MAX_SWAPS):
        busiest = int(rank_work.argmax())
        if rank_work[busiest] <= SWAP_IMBALANCE * rank_work.mean():
            break
        # The larger work of the two ranks after each possible swap, [own chunks, P, other chunks].
        change = work[assigned[busiest]][:, None, None] - work[assigned]
        larger = np.maximum(rank_work[busiest] - change, rank_work[:, None] + change)
        larger[:, busiest] = np.inf
        own, rank, other = np.unravel_index(larger.argmin(), larger.shape)
        if larger[own, rank, other] >= rank_work[busiest]:
            break
        moved = change[own, rank, other]
        rank_work[busiest] -= moved
        rank_work[rank] += moved
        assigned[busiest, own], assigned[rank, other] = assigned[rank, other], assigned[busiest, own]
    return assigned


def causal_keys(rows: Rows) -> Tensor:
    """The work of tokens under dense causal attention."""
    return count_keys_per_query(AttentionMask(causal=True), rows)


def check_layout(name: str) -> None:
    """Raise ConfigError, with the nearest name, for a layout that does not exist."""
    if name not in LAYOUTS:
        hint = nearest_name_hint(name, list(LAYOUTS))
        raise ConfigError(f"parallel.layout={name!r} does not exist; choose one of {', '.join(LAYOUTS)}.{hint}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shards:
    """One sequence sharded over the ranks of a context-parallel group.

    rows: all rows of the sequence, in order, on the CPU; every rank knows them all.
    index: int64 `[P, tokens_local]`, the token behind each local row; -1 is padding.
    """

    rows: Rows
    index: Tensor

    @staticmethod
    def build(rows: Rows, *, layout: str, degree: int, work: Callable[[Rows], Tensor] = causal_keys) -> "Shards":
        """Shard `rows` over `degree` ranks; raises ConfigError for an unknown layout.

        work: of each token, as `Mechanism.keys_per_query` returns it.
        """
        check_layout(layout)
        return Shards(rows=rows, index=LAYOUTS[layout](len(rows), degree, lambda: work(rows)))

    @property
    def degree(self) -> int:
        return self.index.shape[0]

    @property
    def tokens_local(self) -> int:
        return self.index.shape[1]

    def rows_of(self, rank: int) -> Rows:
        """Return the rows of `rank`, in its order."""
        return self.rows.take(self.index[rank])

    def shard(self, x: Tensor, rank: int, *, fill: int | float = 0) -> Tensor:
        """Return the rows of `x` `[tokens, ...]` that `rank` holds, `[tokens_local, ...]`; padding is `fill`."""
        index = self.index[rank].to(x.device)
        padding = (index < 0).view(-1, *[1] * (x.dim() - 1))  # [tokens_local] -> [tokens_local, 1, ...]
        return x[index.clamp(min=0)].masked_fill(padding, fill)

    def unshard(self, parts: Tensor) -> Tensor:
        """Return `[tokens, ...]` in order from the rows of all ranks `[P, tokens_local, ...]`, without padding."""
        # [P, T, ...] -> [P * T, ...] -> [tokens, ...]
        return parts.flatten(0, 1)[self.order()[: len(self.rows)].to(parts.device)]

    # A slot is a row of all ranks' rows set end to end: slot = rank x tokens_local + local row.

    def slots(self) -> Tensor:
        """Return the slot of each token, int64 `[tokens]`."""
        index = self.index.flatten()  # [P, T] -> [P * T]
        slots = torch.empty(len(self.rows), dtype=torch.int64)
        slots[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        return slots

    def order(self) -> Tensor:
        """Return the slot of each token, then of each padding row, int64 `[P * tokens_local]`."""
        index = self.index.flatten()  # [P, T] -> [P * T]
        return index.masked_fill(index < 0, len(self.rows)).argsort(stable=True)

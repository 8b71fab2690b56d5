"""Key convolution: a short causal convolution over keys (FlashMoBA, arXiv 2511.11571, "key convolution").

    k'_t = k_t + silu(sum over l < W of w_l * k_{t-l})        w_l: one weight per KV head and feature, [W, Hk, D]

Verified in the paper: the abstract (a short convolution on keys, which gathers related keys in a block) and the widths
of 3 and 5. From memory, as the released code has no convolution: depthwise, causal, SiLU, the residual. Nothing is read
across documents, so a document's first keys have fewer terms.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.rows import Rows
from farspan.kernels.merge import accumulation_dtype

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of the keys that are processed at once, by kind of device: scratch stays small, and is reused; a GPU has a
few hundred MiB of it, so that it is not kept waiting for launches."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Taps:
    """The key that each tap of the convolution reads, for rows in any order and a halo of rows of other ranks.

    sources: int64 `[W - 1, rows]`, the index that a row reads at lags 1, 2, ... in the concatenated rows and halo;
    `rows + halo` where it reads nothing. readers: the inverse map, int64 `[W - 1, rows + halo]`: the row that reads an
    index, `rows` where none does. padding: bool `[rows, 1, 1]`; such keys count as 0, whatever they hold.
    """

    sources: Tensor
    readers: Tensor
    padding: Tensor

    @staticmethod
    def build(rows: Rows, halo: Rows, width: int) -> "Taps":
        """Find the `width - 1` rows before each of `rows` among themselves and `halo`; the weight has `width` taps."""
        among = Rows(
            position=torch.cat((rows.position, halo.position)), document=torch.cat((rows.document, halo.document))
        )
        earlier = earlier_rows(rows, among, width - 1)
        sources = torch.where(earlier < 0, len(among), earlier)
        # The last column, read by rows without a source, is dropped.
        readers = torch.full((width - 1, len(among) + 1), len(rows))
        readers.scatter_(1, sources, torch.arange(len(rows)).expand(width - 1, -1))
        padding = (rows.document < 0).view(-1, 1, 1)
        return Taps(sources=sources, readers=readers[:, :-1].contiguous(), padding=padding)

    def to(self, device: torch.device) -> "Taps":
        sources, readers, padding = (copy_to(x, device) for x in (self.sources, self.readers, self.padding))
        return Taps(sources=sources, readers=readers, padding=padding)


def earlier_rows(rows: Rows, among: Rows, reach: int) -> Tensor:
    """The indices in `among` of the rows 1, 2, ... `reach` positions earlier in the same document, or -1.

    int64 `[reach, rows]`. Padding has and is no earlier row. No two of `among` have the same document and position.
    """
    earlier = torch.full((reach, len(rows)), -1)
    if not len(among):
        return earlier
    keys, order = among.ordinal().sort()
    for lag in range(1, reach + 1):
        # Ordinals of different documents are 2^32 apart, so a lag never reaches into another document.
        wanted = rows.ordinal() - lag
        index = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        exists = (keys[index] == wanted) & (rows.document >= 0)
        earlier[lag - 1] = torch.where(exists, order[index], -1)
    return earlier


@torch.no_grad()
def convolve(k: Tensor, halo: Tensor, weight: Tensor, taps: Taps) -> Tensor:
    """The convolved keys `[T, Hk, D]` of k `[T, Hk, D]` with halo `[N, Hk, D]` and weight `[W, Hk, D]`.

    All of one dtype, as is the result; sums are float32 (float64 for float64). Padding gives 0. Not differentiable by
    autograd: see `convolve_backward`. Raises ValueError where shapes do not fit the taps.
    """
    source, weight = _prepared(k, halo, weight, taps)
    out = torch.empty_like(k)
    for rows in _chunks(k, len(k)):
        sums = _sums(source, weight, taps, rows)
        out[rows] = functional.silu(sums, inplace=True).add_(source[rows])
    return out


@torch.no_grad()
def convolve_backward(
    dout: Tensor, k: Tensor, halo: Tensor, weight: Tensor, taps: Taps
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dhalo, dweight) in the accumulation dtype; the sums of `convolve` are recomputed, chunk by chunk.

    Each key has at most one reader at each lag, so no sum depends on the order of concurrent additions.
    """
    source, weight = _prepared(k, halo, weight, taps)
    dout = dout.masked_fill(taps.padding, 0.0)
    # Last: keys without a reader.
    dsums = torch.zeros(len(k) + 1, *k.shape[1:], dtype=weight.dtype, device=k.device)
    dweight = torch.zeros_like(weight)
    for rows in _chunks(k, len(k)):
        part = dsums[rows]
        sums = _sums(source, weight, taps, rows)
        gate = sums.sigmoid()
        torch.mul(dout[rows], gate.addcmul_(sums.mul_(1 - gate), gate), out=part)  # silu' = s + x s (1 - s)
        # [rows, Hk, D] -> [Hk, D] for each lag
        dweight[0] += (part * source[rows]).sum(dim=0)
        for lag, sources in enumerate(taps.sources[:, rows], start=1):
            dweight[lag] += (part * source.index_select(0, sources)).sum(dim=0)
    dsource = torch.empty(len(k) + len(halo), *k.shape[1:], dtype=weight.dtype, device=k.device)
    torch.addcmul(dout.to(weight.dtype), dsums[:-1], weight[0], out=dsource[: len(k)])
    dsource[len(k) :] = 0
    for rows in _chunks(k, len(dsource)):
        for readers, of_lag in zip(taps.readers[:, rows], weight[1:], strict=True):
            dsource[rows].addcmul_(dsums.index_select(0, readers), of_lag)
    return dsource[: len(k)], dsource[len(k) :], dweight


def _chunks(k: Tensor, rows: int) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS["cpu" if k.device.type == "cpu" else "cuda"]
    step = max(elements // max(k.shape[1:].numel(), 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _sums(source: Tensor, weight: Tensor, taps: Taps, rows: slice) -> Tensor:
    """The convolution of `rows` without SiLU and residual, in the dtype of the widened weight."""
    sums = source[rows] * weight[0]
    for sources, of_lag in zip(taps.sources[:, rows], weight[1:], strict=True):
        sums.addcmul_(source.index_select(0, sources).to(sums.dtype), of_lag)
    return sums


def _prepared(k: Tensor, halo: Tensor, weight: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Keys, halo and a row of zeros for taps that read nothing, `[T + N + 1, Hk, D]`, and the weight to sum with.

    Raises ValueError where shapes do not fit the taps.
    """
    taps_and_rows, num_keys = taps.sources.shape, taps.readers.shape[1]
    if (weight.shape[0] - 1, len(k)) != taps_and_rows or len(k) + len(halo) != num_keys:
        raise ValueError(
            f"these taps are for a weight of {taps_and_rows[0] + 1}, {taps_and_rows[1]} keys and "
            f"{num_keys - taps_and_rows[1]} of a halo; got {weight.shape[0]}, {len(k)} and {len(halo)}"
        )
    if not k.shape[1:] == halo.shape[1:] == weight.shape[1:]:
        raise ValueError(
            f"keys, halo and weight must have the same heads and features; got {list(k.shape)}, {list(halo.shape)} and "
            f"{list(weight.shape)}"
        )
    source = torch.cat((k, halo, k.new_zeros(1, *k.shape[1:])))
    # 0 x NaN: padding would reach the gradient of the weight.
    source[: len(k)].masked_fill_(taps.padding, 0.0)
    return source, weight.to(accumulation_dtype(weight.dtype)).contiguous()

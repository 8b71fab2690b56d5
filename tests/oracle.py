"""Attention written a second time, row by row, from the definitions; it shares nothing with the code under test."""

import math

import torch
from torch import Tensor

from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility

# Largest error relative to the largest value, by dtype. float64 and float32: some hundred roundings of sums of O(1)
# terms. bfloat16: inputs, probabilities and results are rounded to 8 bits, 2^-9 each.
RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def visible_pairs(queries: Rows, keys: Rows, visibility: Visibility) -> list[list[int]]:
    """Return for each query row the key rows that it may see, by plain comparison of integers."""
    key_list = list(zip(keys.position.tolist(), keys.document.tolist(), strict=True))
    pairs = []
    for position, document in zip(queries.position.tolist(), queries.document.tolist(), strict=True):
        seen = []
        for j, (key_position, key_document) in enumerate(key_list):
            if document < 0 or key_document != document:
                continue
            if visibility.causal and key_position > position:
                continue
            if visibility.window is not None and abs(position - key_position) >= visibility.window:
                continue
            seen.append(j)
        pairs.append(seen)
    return pairs


def attention(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return (out, lse) one query row at a time, differentiable by autograd."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for row, keys in zip(q, seen, strict=True):
        if not keys:
            outs.append(0.0 * (row.sum() + k.sum() + v.sum()) + row.new_zeros(q.shape[1], v.shape[2]))
            lses.append(row.new_full((q.shape[1],), -math.inf))
            continue
        mine_k, mine_v = (x[keys].repeat_interleave(group, dim=1) for x in (k, v))  # [keys, Hq, ...]
        scores = (row.unsqueeze(0) * mine_k).sum(-1) / math.sqrt(q.shape[2])  # [keys, Hq]
        outs.append((scores.softmax(dim=0).unsqueeze(-1) * mine_v).sum(0))
        lses.append(scores.logsumexp(dim=0))
    return torch.stack(outs), torch.stack(lses)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value or 1; NaN, or -inf in other places, counts as infinite.

    Not below 1: a gradient whose true value is 0 is all rounding error of the O(1) terms that cancel in it.
    """
    got, expected = got.double(), expected.double()
    if got.shape != expected.shape or got.isnan().any() or not torch.equal(got.isneginf(), expected.isneginf()):
        return math.inf
    if not got.numel():
        return 0.0
    finite = expected.masked_fill(expected.isneginf(), 0.0)
    difference = (got.masked_fill(got.isneginf(), 0.0) - finite).abs().max().item()
    return difference / max(finite.abs().max().item(), 1.0)


def rms_error(got: Tensor, expected: Tensor) -> float:
    """The root mean square of the differences over that of the finite values."""
    finite = expected.isfinite()
    difference, expected = got[finite].double() - expected[finite].double(), expected[finite].double()
    return (difference.square().mean() / expected.square().mean()).sqrt().item()

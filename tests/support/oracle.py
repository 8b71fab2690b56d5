"""Attention written a second time, from the definitions; it shares nothing with the code under test."""

import functools
import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.testing import relative_error

# Largest error relative to the largest value, by dtype. float64 and float32: some hundred roundings of sums of O(1)
# terms. bfloat16: inputs, probabilities and results are rounded to 8 bits, 2^-9 each.
RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@functools.lru_cache(maxsize=1 << 16)
def neighbors(position: int, neighborhood: Neighborhood) -> set[int]:
    """The positions in a query's neighborhood: a list of the coordinates of its dilation group, sliced."""
    shape = [dimension.length for dimension in neighborhood.dimensions]
    grid, place = divmod(position, math.prod(shape))
    positions = [grid]
    for number, dimension in enumerate(neighborhood.dimensions):
        coordinate = place // math.prod(shape[number + 1 :]) % dimension.length
        line = list(range(coordinate % dimension.dilation, dimension.length, dimension.dilation))
        at = line.index(coordinate)
        stride_group = line[at - at % dimension.stride :][: dimension.stride]
        if dimension.causal:
            leader = line.index(stride_group[-1])
            seen = [c for c in line[max(leader - dimension.window + 1, 0) :] if c <= coordinate]
        else:
            leader = min(at - at % dimension.stride + dimension.stride // 2, len(line) - 1)
            start = min(max(leader - dimension.window // 2, 0), len(line) - dimension.window)
            seen = line[start : start + dimension.window]
        positions = [so_far * dimension.length + c for so_far in positions for c in seen]
    return set(positions)


@functools.lru_cache(maxsize=256)
def visible_mask(queries: Rows, keys: Rows, attention_mask: AttentionMask, heads: int) -> Tensor:
    """The key rows that each query row may see, bool `[heads, queries, keys]`, not to be changed."""
    # Tests ask for the same rows, compared by identity, on each backend and in each dtype.
    position, key_position = queries.position.long()[:, None], keys.position.long()
    seen = (queries.document[:, None] == keys.document) & (queries.document >= 0)[:, None]
    if attention_mask.causal:
        seen &= key_position <= position
    if (neighborhood := attention_mask.neighborhood) is not None:
        for row, at in enumerate(queries.position.tolist()):
            near = neighbors(at, neighborhood)
            seen[row] &= torch.tensor([key in near for key in keys.position.tolist()]).bool()
    if attention_mask.window is None:
        return seen.expand(heads, -1, -1)
    of_heads = attention_mask.window if isinstance(attention_mask.window, tuple) else (attention_mask.window,)
    window = torch.tensor(of_heads)[:, None, None]
    seen = seen & (((position - key_position).abs() < window) | (key_position < attention_mask.sinks))
    return seen.expand(heads, -1, -1)


def selected_mask(selection: BlockSelection, keys: Rows, heads: int) -> Tensor:
    """Whether the block of each key is on the list of each head and query, bool `[heads, queries, keys]`."""
    offsets, chosen = selection.offsets.tolist(), selection.key_blocks.tolist()
    # One row and one column more, for queries and keys without a block.
    on_list = torch.zeros(selection.heads, selection.num_query_blocks + 1, selection.blocks.count + 1).bool()
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        head, query_block = divmod(number, selection.num_query_blocks)
        on_list[head, query_block, chosen[start:stop]] = True
    mask = on_list[:, selection.query_block.long()][:, :, selection.blocks.of(keys).long()]
    return mask.repeat_interleave(heads // selection.heads, dim=0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention where `mask` `[heads, queries, keys]` is True, differentiable by autograd."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].t() / math.sqrt(q.shape[2])
        weight = torch.where(mask[head], scores, -math.inf)
        top = weight.max(dim=1, keepdim=True).values.detach() if k.shape[0] else weight.new_zeros(len(q), 1)
        top = torch.where(top == -math.inf, 0.0, top)
        exponential = torch.where(mask[head], torch.exp(weight - top), 0.0)
        total = exponential.sum(dim=1, keepdim=True)
        sees = total > 0
        outs.append(torch.where(sees, exponential @ v[:, head // group] / torch.where(sees, total, 1.0), 0.0))
        lses.append(torch.where(sees, torch.log(torch.where(sees, total, 1.0)) + top, -math.inf).squeeze(1))
    return torch.stack(outs, dim=1), torch.stack(lses, dim=1)


def decayed_sums(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rows: Rows) -> Tensor:
    """Return the sums over earlier tokens of exp(-rate x distance) (q . k) v, differentiable by autograd."""
    distance = rows.position[:, None] - rows.position[None, :]
    seen = (rows.document[:, None] == rows.document[None, :]) & (rows.document >= 0)[:, None] & (distance >= 0)
    outs = []
    for head, rate in enumerate(decay.tolist()):
        of_key = head // (q.shape[1] // k.shape[1])
        weight = torch.where(seen, torch.exp(-rate * distance.clamp(min=0).double()), 0.0)
        outs.append((q[:, head] @ k[:, of_key].t() * weight) @ v[:, of_key])
    return torch.stack(outs, dim=1)


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """What `assert_close` may allow where q and k are `scale` times as large: scores, and their rounding, grow by both.

    In bfloat16 products of inputs are exact in float32; what grows is the rounding of out, by keys in gradients.
    """
    return RELATIVE_TOLERANCE[dtype] * (scale**0.5 if dtype == torch.bfloat16 else scale**2)


def assert_close(
    got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = RELATIVE_TOLERANCE[torch.float64]
) -> None:
    """As many results as expected, each with a relative error of at most `tolerance`."""
    errors = [relative_error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) <= tolerance, errors


def rms_error(got: Tensor, expected: Tensor) -> float:
    """The root mean square of the differences over that of the finite values."""
    finite = expected.isfinite()
    difference, expected = got[finite].double() - expected[finite].double(), expected[finite].double()
    return (difference.square().mean() / expected.square().mean()).sqrt().item()

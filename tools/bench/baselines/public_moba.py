"""MoBA in the way of its public code (MoonshotAI/MoBA, "efficient"), written from its description, as a baseline.

It runs on flash-attn 2: the gates of all blocks, heads and queries are stored in float32; each block that is not a
document's last is a sequence of its own for each head, with the queries that chose it; own blocks and chosen ones are
two calls, merged by log-sum-exp in float32; both backward calls get the merged out and lse. Keys that heads share are
copied. Unlike the public code, means of keys are taken in float32: in bfloat16 they choose other blocks than the
definition.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.cuda import packages as flash_attn
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.moba import MoBA
from farspan.tools.bench.baselines.flash_packages import check_dtype, cu_seqlens, packed_lengths, with_padding
from farspan.tools.bench.case import Attention, Shape
from farspan.tools.bench.contenders import Contender

MODULE = flash_attn.FlashAttn2.module


@final
class PublicMoBA(Contender):
    """MoBA as two calls of flash-attn 2."""

    name = "public_moba"

    def plan(self, mechanism: Mechanism, rows: Rows, shape: Shape) -> Attention:
        if not isinstance(mechanism, MoBA):
            raise ConfigError(f"{self.name} computes MoBA only.")
        check_dtype(self.name, shape)
        lengths = packed_lengths(self.name, rows)
        blocks = Blocks.cut(lengths, mechanism.block, shape.device)
        return partial(_attend, tokens=sum(lengths), blocks=blocks, others=mechanism.top_k - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Blocks of `size` tokens of packed documents; a document's last block may be shorter.

    longest: tokens of the longest. starts: int32 `[blocks + 1]`. start, end: the first row, and the first row behind
    its document, of each candidate, a block that other tokens can choose: all but the last of each document; int64.
    """

    size: int
    longest: int
    starts: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def cut(lengths: list[int], size: int, device: torch.device) -> "Blocks":
        sizes, start, end, stop = [], [], [], 0
        for length in lengths:
            first, stop = stop, stop + length
            sizes += [min(size, stop - row) for row in range(first, stop, size)]
            candidates = range(first, stop - size, size)
            start += candidates
            end += [stop] * len(candidates)
        starts, ends = (torch.tensor(rows, device=device).long() for rows in (start, end))
        return Blocks(size, max(sizes), cu_seqlens(sizes, device), starts, ends)

    def rows(self) -> Tensor:
        """Return the rows of each candidate, int64 `[candidates, size]`."""
        return self.start[:, None] + torch.arange(self.size, device=self.start.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, tokens: int, blocks: Blocks, others: int) -> Tensor:
    group = q.shape[1] // k.shape[1]
    key, value = (x[:tokens].repeat_interleave(group, dim=1) for x in (k, v))
    return with_padding(_MixedAttention.apply(q[:tokens], key, value, blocks, others), len(q))


def choose(q: Tensor, k: Tensor, blocks: Blocks, others: int) -> Tensor:
    """Return which candidates each head and query chose, bool `[candidates, H, T]`: at most `others` of each."""
    means = k[blocks.rows()].float().mean(dim=1)
    gate = torch.einsum("nhd,thd->nht", means, q.float())
    row = torch.arange(len(q), device=q.device)
    hidden = (row < blocks.start[:, None] + blocks.size) | (row >= blocks.end[:, None])
    gate.masked_fill_(hidden[:, None], float("-inf"))
    best = gate.topk(min(others, len(gate)), dim=0).indices
    return torch.zeros_like(gate, dtype=torch.bool).scatter_(0, best, True) & (gate > float("-inf"))


def chosen_sequences(chosen: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the sequences of the second call: a block and a head that some queries chose.

    Which rows of `[T * H, D]` lie one after another as their queries and as their keys, int64, and their lengths.
    """
    heads, counts = chosen.shape[1], chosen.sum(dim=2)
    _, head, row = chosen.nonzero(as_tuple=True)
    # A sequence without queries would have gradients of NaN.
    block, of_head = counts.nonzero(as_tuple=True)
    lengths = counts[block, of_head]
    sequences = {
        "cu_seqlens_q": F.pad(lengths.cumsum(0), (1, 0)).int(),
        "cu_seqlens_k": torch.arange(len(lengths) + 1, device=chosen.device, dtype=torch.int32) * blocks.size,
        "max_seqlen_q": int(lengths.max()) if len(lengths) else 0,
        "max_seqlen_k": blocks.size,
        "causal": False,
    }
    return row * heads + head, (blocks.rows()[block] * heads + of_head[:, None]).flatten(), sequences


class _MixedAttention(torch.autograd.Function):
    """Attention of q, k, v `[T, H, D]` to own blocks and to chosen ones."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, others: int) -> Tensor:
        own = {"cu_seqlens_q": blocks.starts, "cu_seqlens_k": blocks.starts, "causal": True}
        own |= {"max_seqlen_q": blocks.longest, "max_seqlen_k": blocks.longest}
        query, key, chosen = chosen_sequences(choose(q, k, blocks, others), blocks)
        out, lse = _flash(q, k, v, own)
        out, lse = out.flatten(0, 1), lse.T.flatten()
        gathered = _gather(q, query), _gather(k, key), _gather(v, key)
        if len(query):
            part_out, part_lse = _flash(*gathered, chosen)
            out, lse = _merge(out, lse, part_out[:, 0], part_lse[0], query)
        out = out.to(q.dtype).view_as(q)
        ctx.save_for_backward(q, k, v, out, lse, query, key, *gathered)
        ctx.own, ctx.chosen = own, chosen
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, query, key, chosen_q, chosen_k, chosen_v = ctx.saved_tensors
        dout = dout.contiguous()
        gradients = _flash_backward(dout, q, k, v, out, lse.view(q.shape[:2]).T.contiguous(), ctx.own)
        if not len(query):
            return *gradients, None, None
        chosen_dout, chosen_out, chosen_lse = _gather(dout, query), _gather(out, query), lse[query].unsqueeze(0)
        parts = _flash_backward(chosen_dout, chosen_q, chosen_k, chosen_v, chosen_out, chosen_lse, ctx.chosen)
        added = []
        for gradient, part, rows in zip(gradients, parts, (query, key, key), strict=True):
            total = gradient.float().flatten(0, 1).index_add_(0, rows, part[:, 0].float())
            added.append(total.view_as(gradient).to(gradient.dtype))
        return *added, None, None


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of x `[T, H, D]` as those of one head, `[rows, 1, D]`."""
    return x.flatten(0, 1)[rows].unsqueeze(1)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return out, float32, and lse with partial results of `rows`, each several times perhaps, merged into them."""
    greatest = lse.scatter_reduce(0, rows, part_lse, "amax")
    total = (lse - greatest).exp().index_add_(0, rows, (part_lse - greatest[rows]).exp())
    merged = greatest + total.log()
    weighed = out.float() * (lse - merged).exp()[:, None]
    return weighed.index_add_(0, rows, part.float() * (part_lse - merged[rows]).exp()[:, None]), merged


def _flash(q: Tensor, k: Tensor, v: Tensor, sequences: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return out `[T, H, D]` and lse `[H, T]` of packed sequences."""
    out, lse, *_ = _call("forward", q=q, k=k, v=v, **sequences)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _call(
        "backward", dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=False,
        **sequences,
    )  # fmt: skip
    return dq, dk, dv


def _call(direction: str, q: Tensor, **arguments: Any) -> Any:
    function = getattr(flash_attn.module(MODULE), f"_flash_attn_varlen_{direction}", None)
    assert function is not None
    return flash_attn.call(function, q=q, softmax_scale=q.shape[-1] ** -0.5, **arguments, **flash_attn.PLAIN)

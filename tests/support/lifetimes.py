"""Keys with lifetimes written a second time: token by token, and the learning of types by autograd."""

import math

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from tests.support import oracle

GLOBAL, LOCAL, SLIDING = 0, 1, 2


def documents(rows: Rows) -> list[list[int]]:
    """The rows of each document, in the order of their positions."""
    result: dict[int, list[tuple[int, int]]] = {}
    for row, (document, position) in enumerate(zip(rows.document.tolist(), rows.position.tolist(), strict=True)):
        if document >= 0:
            result.setdefault(document, []).append((position, row))
    return [[row for _, row in sorted(members)] for members in result.values()]


def types(logits: Tensor, rows: Rows) -> list[list[int]]:
    """The type of each token of each KV head, by logits `[T, Hk, 3]`; padding counts as global."""
    result = [[GLOBAL] * len(rows) for _ in range(logits.shape[1])]
    for head, of_head in enumerate(result):
        for members in documents(rows):
            for row in members[1:-1]:
                scores = logits[row, head].tolist()
                of_head[row] = scores.index(max(scores))
    return result


def visible(logits: Tensor, rows: Rows, window: int) -> Tensor:
    """Which keys each query sees, bool `[Hk, T, T]`, pair by pair."""
    masks = []
    for kind in types(logits, rows):
        mask = [[False] * len(rows) for _ in range(len(rows))]
        for members in documents(rows):
            for nth, key in enumerate(members):
                ended = False
                for later, query in enumerate(members[nth:], nth):
                    mask[query][key] = (
                        kind[key] == GLOBAL
                        or (kind[key] == LOCAL and not ended)
                        or (kind[key] == SLIDING and later - nth <= window)
                    )
                    ended = ended or (later > nth and kind[query] == GLOBAL)
        masks.append(mask)
    return torch.tensor(masks, dtype=torch.bool).view(logits.shape[1], len(rows), len(rows))


def relaxed(t: Tensor, rows: Rows, window: int) -> Tensor:
    """M `[Hk, T, T]` of relaxed types `[T, Hk, 3]`: t0 + t1 * prod of (1 - t0) between + t2 * (in the window)."""
    mask = t.new_zeros(t.shape[1], len(rows), len(rows))
    for members in documents(rows):
        of_global, local, sliding = t[members].permute(2, 1, 0)
        place = torch.arange(len(members))
        not_ended = torch.ones_like(of_global)
        columns = []
        for i in range(len(members)):
            # not_ended[j] becomes the product over j < m < i.
            if i:
                not_ended = torch.where(place < i - 1, not_ended * (1 - of_global[:, i - 1 : i]), not_ended)
            seen = of_global + local * not_ended + sliding * (i - place <= window)
            columns.append(seen * (place <= i))
        block = torch.stack(columns, dim=1)
        index = torch.tensor(members)
        mask = mask.index_put((torch.arange(t.shape[1])[:, None, None], index[:, None], index), block)
    return mask


def free(rows: Rows) -> Tensor:
    """Which tokens may have a type of their own, bool `[T]`: all but the ends of documents, and padding."""
    result = torch.zeros(len(rows), dtype=torch.bool)
    for members in documents(rows):
        result[members[1:-1]] = True
    return result


def one_hot_types(logits: Tensor, rows: Rows, temperature: float) -> Tensor:
    """Return the types `[T, Hk, 3]` with the gradient of a softmax, as far as they are free."""
    hard = torch.nn.functional.one_hot(torch.tensor(types(logits, rows)).t(), 3).to(logits.dtype)
    soft = (logits / temperature).softmax(dim=-1)
    return hard + torch.where(free(rows)[:, None, None], soft - soft.detach(), 0.0)


def attention(q: Tensor, k: Tensor, v: Tensor, t: Tensor, rows: Rows, window: int) -> tuple[Tensor, Tensor]:
    """Return out and lse by types t `[T, Hk, 3]`, differentiable.

    The mask's values are hard; its gradient is that of the relaxed one, times exp(lse - lse of all causal scores).
    """
    group = q.shape[1] // k.shape[1]
    see = visible(t.detach(), rows, window).repeat_interleave(group, dim=0)
    mask = relaxed(t, rows, window).repeat_interleave(group, dim=0)
    torch.testing.assert_close(mask.detach(), see.to(q.dtype), rtol=0, atol=1e-12)
    causal = oracle.visible_mask(rows, rows, AttentionMask(causal=True), q.shape[1])
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, dim=1)) / math.sqrt(q.shape[2])
    lse, causal_lse = (scores.detach().masked_fill(~m, -math.inf).logsumexp(dim=-1) for m in (see, causal))
    top, causal_top = (torch.where(causal.any(dim=-1), x, 0.0)[:, :, None] for x in (lse, causal_lse))
    # Hidden scores may tower over visible ones: exp(score - lse) x factor is exp(score - lse of all causal scores).
    learned = torch.exp(torch.where(causal, scores.detach(), -math.inf) - causal_top) * (mask - mask.detach())
    exponential = torch.where(see, torch.exp(torch.where(see, scores, 0.0) - top), 0.0) + learned
    total = exponential.sum(dim=-1, keepdim=True)
    out = exponential @ v.repeat_interleave(group, dim=1).transpose(0, 1) / torch.where(total > 0, total, 1.0)
    return out.transpose(0, 1), lse.t()


def penalty(t: Tensor, rows: Rows, size: float) -> Tensor:
    """A number whose gradient by the types is what the paper adds: how much of its document each key lives."""
    kind, total = t.argmax(dim=-1), t.new_zeros(())
    for members in documents(rows):
        for head in range(kind.shape[1]):
            for nth, row in enumerate(members):
                if kind[row, head] == GLOBAL:
                    life = len(members) - nth
                elif kind[row, head] == LOCAL:
                    life = next(i for i in range(nth, len(members)) if kind[members[i], head] == GLOBAL) - nth
                else:
                    continue
                total = total + size * life / len(members) * t[row, head, kind[row, head]]
    return total

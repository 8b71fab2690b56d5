"""flash-attn 2, 3 and 4 where they are not installed: the signatures of their functions, computed by plain torch.

Required parameters, their order and the results are those of flash-attn 2.8.3.post2, FlashAttention 3 (3.0.0.b1 and the
head of its repository) and flash-attn-4 (4.0.0b36); of the optional ones only those are here that we pass, by keyword.
Like the real ones, those of flash-attn 2 and of the head of FlashAttention 3 are custom operators, whose signatures
cannot be inspected. Each fails on inputs that the real one does not support.
"""

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.cuda import packages as flash_attn

CALLED: list[str] = []
"""Names of the packages in the order of their calls."""
UNCACHED = flash_attn.module.__wrapped__
Three = tuple[Tensor, Tensor, Tensor]


def scores(q: Tensor, k: Tensor, causal: bool, scale: float, window: tuple[int, int]) -> Tensor:
    """Return scaled scores `[H, T, S]` of q `[T, H, D]` and k `[S, Hk, D]`, aligned bottom right."""
    key = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = torch.einsum("thd,shd->hts", q.float(), key) * scale
    distance = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None] - (k.shape[0] - q.shape[0])
    left, right = window[0], 0 if causal else window[1]
    mask = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    return found.masked_fill(~mask, -math.inf)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: tuple[int, int] = (-1, -1)
) -> tuple[Tensor, Tensor]:
    """Return out `[T, H, D]` and lse `[H, T]`, which autograd can differentiate."""
    found = scores(q, k, causal, scale, window)
    value = v.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("hts,shd->thd", found.softmax(-1), value).to(q.dtype), found.logsumexp(-1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Three:
    """Return (dq, dk, dv) by the formula."""
    p = (scores(q, k, causal, scale, (-1, -1)) - lse.unsqueeze(-1)).exp()
    dout, shared = dout.float(), (k.shape[1], q.shape[1] // k.shape[1])
    key, value = (x.float().repeat_interleave(shared[1], dim=1) for x in (k, v))
    delta = (dout * out.float()).sum(-1).t().unsqueeze(-1)
    ds = p * (torch.einsum("thd,shd->hts", dout, value) - delta) * scale
    dq, dk = torch.einsum("hts,shd->thd", ds, key), torch.einsum("hts,thd->shd", ds, q.float())
    dv = torch.einsum("hts,thd->shd", p, dout)
    # [S, H, D] -> [S, Hk, H/Hk, D] -> [S, Hk, D]
    dk, dv = (x.unflatten(1, shared).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def check(name: str, widest: int, *tensors: Tensor) -> None:
    CALLED.append(name)
    assert len({x.dtype for x in tensors}) == 1
    assert tensors[0].dtype in (torch.bfloat16, torch.float16)
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] <= widest for x in tensors)
    assert all(x.numel() for x in tensors)


def fill(targets: tuple[Tensor | None, ...], found: Three) -> None:
    for target, gradient in zip(targets, found, strict=True):
        assert target is not None
        target.copy_(gradient)


def sequences(
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None
) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each packed sequence."""
    assert cu_q is not None
    assert cu_k is not None
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert cu_k.is_contiguous()
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    for rows, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert rows[1] > rows[0], "the real one gives NaN for a sequence without queries"
        assert keys[1] > keys[0], "versions differ in what they return for a sequence without keys"
        yield slice(*rows), slice(*keys)


def packed(
    name: str, widest: int, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int | None, max_k: int | None, scale: float | None, causal: bool, window: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out `[T, H, D]` and lse `[H, T]` of packed sequences, one after another."""
    check(name, widest, q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [
        forward(q[rows], k[keys], v[keys], causal, factor, window) for rows, keys in sequences(cu_q, cu_k, max_q, max_k)
    ]
    outs, lses = zip(*parts, strict=True)
    out = torch.cat(outs)
    assert out.shape[0] == q.shape[0]
    return out, torch.cat(lses, dim=1)


def packed_backward(
    name: str, widest: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None, scale: float | None, causal: bool,
) -> Three:  # fmt: skip
    check(name, widest, dout, q, k, v, out)
    assert scale is not None
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    parts = [
        backward(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], causal, scale)
        for rows, keys in sequences(cu_q, cu_k, max_q, max_k)
    ]
    dq, dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape), "all rows are in a sequence"
    return dq, dk, dv


def empty() -> Tensor:
    return torch.zeros(0)


@torch.library.custom_op("farspan_fake_2::varlen_forward", mutates_args=())
def fa2_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *packed("fa2", 256, q, k, v, *lengths, softmax_scale, causal), empty(), empty()


@torch.library.custom_op("farspan_fake_2::varlen_backward", mutates_args=("dq", "dk", "dv"))
def fa2_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    fill((dq, dk, dv), packed_backward("fa2", 256, *given, softmax_scale, causal))
    return empty()


def fa2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, window_size=(-1, -1)
) -> Tensor:
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return packed("fa2_public", 256, q, k, v, *lengths, None, causal, window_size)[0]


def fa2_old_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size
) -> Tensor:
    """flash-attn 2.6, which has one window and returns eight values."""
    raise AssertionError("this version is never called")


def fa3_b1_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, *, attention_chunk=0,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert (k_new, qv, out, seqused_q, page_table, q_descale) == (None,) * 6
    assert softmax_scale is not None
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *packed("fa3", 256, q, k, v, *lengths, softmax_scale, causal), empty(), empty()


def fa3_b1_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert (sequed_q, sequed_k) == (None, None)
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    fill((dq, dk, dv), packed_backward("fa3", 256, *given, softmax_scale, causal))
    return dq, dk, dv, empty()


def fa3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, window_size=(-1, -1)
) -> Tensor:
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return packed("fa3_public", 256, q, k, v, *lengths, None, causal, window_size)[0]


@torch.library.custom_op("farspan_fake_3::forward", mutates_args=())
def fa3_head_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, softmax_scale: float | None = None,
    causal: bool = False, attention_chunk: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert softmax_scale is not None
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *packed("fa3", 256, q, k, v, *lengths, softmax_scale, causal), empty(), empty()


@torch.library.custom_op("farspan_fake_3::backward", mutates_args=("dq", "dk", "dv"))
def fa3_head_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False,
) -> Tensor:  # fmt: skip
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    fill((dq, dk, dv), packed_backward("fa3", 256, *given, softmax_scale, is_causal))
    return empty()


def fa4_b36_forward(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, return_lse=False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert return_lse or any(x.requires_grad for x in (q, k, v)), "it keeps its lse to itself"
    assert softmax_scale is not None
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *packed("fa4", 128, q, k, v, *lengths, softmax_scale, causal), None, None, None


def fa4_b36_backward(
    q, k, v, out, dout, lse, *, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return packed_backward("fa4", 128, dout, q, k, v, out, lse, *lengths, softmax_scale, causal)


def fa4_early_forward(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    """That inside flash-attn 2.8.3, whose lse is None where nothing requires a gradient."""
    raise AssertionError("this version is never called")


def fa4_varlen_func(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    window_size=(None, None),
) -> tuple[Tensor, None]:  # fmt: skip
    assert -1 not in window_size, "None is no window"
    window = (-1 if window_size[0] is None else window_size[0], -1 if window_size[1] is None else window_size[1])
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return packed("fa4_public", 128, q, k, v, *lengths, None, causal, window)[0], None


FA2 = {"_flash_attn_varlen_forward": fa2_varlen_forward, "_flash_attn_varlen_backward": fa2_varlen_backward,
       "flash_attn_varlen_func": fa2_varlen_func}  # fmt: skip
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fa2": ("flash_attn.flash_attn_interface", FA2),
    "fa2_old": ("flash_attn.flash_attn_interface", FA2 | {"_flash_attn_varlen_forward": fa2_old_forward}),
    "fa3_b1": (
        "flash_attn_interface",
        {"_flash_attn_forward": fa3_b1_forward, "_flash_attn_backward": fa3_b1_backward,
         "flash_attn_varlen_func": fa3_varlen_func},
    ),
    "fa3_head": (
        "flash_attn_interface",
        {"_flash_attn_forward": fa3_head_forward, "_flash_attn_backward": fa3_head_backward,
         "flash_attn_varlen_func": fa3_varlen_func},
    ),
    "fa4_b36": (
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": fa4_b36_forward, "_flash_attn_bwd": fa4_b36_backward,
         "flash_attn_varlen_func": fa4_varlen_func},
    ),
    "fa4_early": (
        "flash_attn.cute.interface", {"_flash_attn_fwd": fa4_early_forward, "_flash_attn_bwd": fa4_b36_backward},
    ),
}  # fmt: skip
"""The module and the functions of each version."""


def install(monkeypatch: pytest.MonkeyPatch, *versions: str) -> None:
    """Have these versions installed, and no other, and none of them called yet."""
    modules: dict[str, ModuleType | None] = dict.fromkeys((name for name, _ in VERSIONS.values()), None)
    for version in versions:
        name, functions = VERSIONS[version]
        modules[name] = ModuleType(name)
        vars(modules[name]).update(functions)
    for name, module in modules.items():
        # None in this place is a module that cannot be imported.
        monkeypatch.setitem(sys.modules, name, module)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(flash_attn, "module", UNCACHED)
    CALLED.clear()

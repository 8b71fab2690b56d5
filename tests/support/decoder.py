"""The decoder a second time, by its formulas, in float64 on full sequences, with torch's own cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequence
from farspan.trainer.model.config import ModelConfig
from tests.support.mixture import Seen, head_gates, mixed


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotate(x: Tensor, position: Tensor, base: float, rotated: int) -> Tensor:
    """Rotary embedding of the first R features as multiplication of complex numbers, i paired with i + R/2."""
    half = (rotated or x.shape[-1]) // 2
    angle = position[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def convolved(k: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Keys and SiLU of the weighted keys up to them; tokens of a document stand in a row."""
    taps = weight.view(*k.shape[1:], -1).unbind(-1)
    reached = [F.pad(k, (0, 0, 0, 0, lag, 0))[: len(k)] * (position >= lag)[:, None, None] for lag in range(len(taps))]
    return k + F.silu(torch.stack([tap * part for tap, part in zip(taps, reached, strict=True)]).sum(0))


def attention(
    p: dict[str, Tensor], name: str, model: ModelConfig, x: Tensor, position: Tensor, visible: Tensor, seen: Seen
) -> Tensor:
    q, k, v = (
        (x @ p[f"{name}{part}.weight"].T + (p[f"{name}{part}.bias"] if model.qkv_bias else 0)).unflatten(
            -1, (-1, model.head_dim)
        )
        for part in ("query", "key", "value")
    )
    if model.key_convolution:
        k = convolved(k, p[name + "key_convolution.weight"], position)
    if model.qk_norm:
        q = rms(q, p[name + "query_norm.weight"], model.norm_epsilon)
        k = rms(k, p[name + "key_norm.weight"], model.norm_epsilon)
    q, k = (rotate(part, position, model.rope.base, model.rope.rotated) for part in (q, k))
    k, v = (part.repeat_interleave(model.heads // model.kv_heads, dim=1) for part in (k, v))
    if model.head_mixture.kind == "experts" and not model.head_mixture.own_keys:
        k, v = (part.repeat(1, model.head_mixture.count, 1) for part in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / model.head_dim**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    attended = torch.einsum("hts,shd->thd", weights, v)
    if model.head_mixture.kind != "none":
        gates, chosen_by = head_gates(model, x @ p[name + "head_router.weight"].T, p[name + "bias"])
        attended = attended * gates.unsqueeze(-1)
        seen.heads.append(chosen_by)
    return attended.flatten(1) @ p[name + "out.weight"].T


def gated_recurrence(
    p: dict[str, Tensor], name: str, model: ModelConfig, x: Tensor, position: Tensor, visible: Tensor
) -> Tensor:
    """As in MiniMax-01, decays as one matrix; visible `[T, S]`: of the same document and not later."""
    layer = int(name.split(".")[1])
    q, k, v = (
        F.silu(x @ p[f"{name}{part}.weight"].T).unflatten(-1, (model.heads, model.head_dim))
        for part in ("query", "key", "value")
    )
    slower = 1 - layer / (model.layers - 1 + 1e-5) + 1e-5
    slopes = [2 ** (-8 * (head + 1) / model.heads) * slower for head in range(model.heads)]
    age = (position[:, None] - position[None]).clamp(min=0)
    weights = torch.exp(-torch.tensor(slopes, dtype=torch.float64)[:, None, None] * age) * visible  # [H, T, S]
    sums = torch.einsum("hts,shd->thd", torch.einsum("thd,shd->hts", q, k) * weights, v).flatten(1)
    normed = rms(sums, p[name + "norm.weight"], model.norm_epsilon)
    return (torch.sigmoid(x @ p[name + "gate.weight"].T) * normed) @ p[name + "out.weight"].T


def summed_loss(parameters: dict[str, Tensor], config: Config, sequence: PackedSequence, seen: Seen) -> Tensor:
    """The sum of the losses of the labeled tokens of one full sequence."""
    tokens, position, document = (torch.from_numpy(x) for x in (sequence.tokens, sequence.position, sequence.document))
    found = logits(parameters, config.model, tokens, position, document, seen)
    return F.cross_entropy(found, torch.from_numpy(sequence.labels), ignore_index=-100, reduction="sum")


def logits(
    parameters: dict[str, Tensor], model: ModelConfig, tokens: Tensor, position: Tensor, document: Tensor, seen: Seen
) -> Tensor:
    """Of one full sequence, `[T, V]`."""
    p = parameters
    visible = (document[:, None] == document[None]) & (position[:, None] >= position[None])
    x = p["embedding.weight"][tokens]
    for i in range(model.layers):
        name = f"blocks.{i}."
        normed = rms(x, p[name + "attention_norm.weight"], model.norm_epsilon)
        attended = (
            gated_recurrence(p, name + "attention.", model, normed, position, visible)
            if name + "attention.gate.weight" in p
            else attention(p, name + "attention.", model, normed, position, visible, seen)
        )
        x = x + attended
        if not model.parallel_blocks:
            normed = rms(x, p[name + "feed_forward_norm.weight"], model.norm_epsilon)
        if name + "feed_forward.router.weight" in p:
            x = x + mixed(p, name + "feed_forward.", model.experts, normed, seen)
            continue
        gate, up = (normed @ p[f"{name}feed_forward.{part}.weight"].T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ p[name + "feed_forward.down.weight"].T
    head = p["embedding.weight" if model.tied_embeddings else "head.weight"]
    return rms(x, p["norm.weight"], model.norm_epsilon) @ head.T

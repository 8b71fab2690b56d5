"""No layer waits for a device: what runs on one takes tensors without numbers, where asking for one is an error.

Selections of blocks are not here: on a device Triton's kernels make them (triton_kernels/interpreted_choice.py).
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from farspan.kernels import recurrent_attention
from farspan.kernels.cuda import flash as cuda_flash
from farspan.kernels.kinds import kv_lifetime
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.token_choice import TokenChoice
from farspan.kernels.layers import fused
from farspan.kernels.layers.cross_entropy import linear_cross_entropy
from farspan.kernels.layers.key_convolution import Taps, convolve, convolve_backward
from farspan.kernels.layers.norm import rms_norm
from farspan.kernels.layers.rope import apply_rope, inverse_frequencies, rotation_table
from farspan.kernels.lifetimes.gradient import SUMS
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.moe.expert_router import ExpertRouter
from farspan.kernels.moe.head_router import AttentionExperts, MixtureOfHeads
from farspan.kernels.planner import HeadShare
from farspan.kernels.planning.plan import Plan
from farspan.kernels.routing.router_logits import routing_logits
from farspan.kernels.sequence_attention import SequencePlanner, plan_sequence_attention
from tests.support.mechanisms import examples, inputs_of

META = torch.device("meta")
PACKED = Rows.packed([50, 1, 90], padding=3)
HEADS = Heads(query=8, kv=2)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)


RECURRENCE = SimpleNamespace(
    scan=lambda inputs: (inputs.q.new_empty(*inputs.q.shape[:2], inputs.v.shape[2]), inputs.state),
    scan_backward=lambda dout, dstate, inputs: (inputs.q, inputs.k, inputs.v, torch.empty_like(dstate)),
)


@pytest.mark.parametrize("order", ["in order", "shuffled"])
@pytest.mark.parametrize(
    "mechanism",
    [
        *(x for x in examples(Masked) if x.static_mask is not None),
        *Lightning.examples(),
        *(x for x in examples(TokenChoice) if x.counts_are_known),
    ],
    ids=str,
)
def test_attention(mechanism: Mechanism, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, isolation, merges and what a backend does around the kernels, which are not run."""
    monkeypatch.setattr(cuda_flash, "generation", lambda device: 8)
    monkeypatch.setattr(recurrent_attention, "_recurrent_backend", lambda _: RECURRENCE)
    rows = PACKED
    if order == "shuffled":
        rows = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    *inputs, dout = (x.to(META) for x in inputs_of(mechanism, len(rows), HEADS, dtype=torch.bfloat16))
    attention = plan_sequence_attention(mechanism, rows, HEADS, range(HEADS.query), backend="cuda")
    out, saved = attention.forward(*inputs)
    assert out.shape == dout.shape
    assert [x.shape for x in attention.backward(dout, saved)] == [x.shape for x in inputs]


def test_lifetimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank with some of the tokens and with padding: types, lifetimes, a part's plan, and what types learn."""
    given = (meta(len(PACKED), heads, width) for heads, width in ((8, 16), (2, 16), (2, 16), (2, 3)))
    q, k, v, logits = (x.detach() for x in given)
    tokens = torch.arange(len(PACKED)).roll(7).masked_fill(torch.arange(len(PACKED)) > 130, -1)
    planner = replace(SequencePlanner.of(PACKED, HeadShare.all(HEADS), backend="triton"), tokens=tokens)
    monkeypatch.setattr(kv_lifetime, "attention_forward", lambda q, k, v, plan, backend: (q, q[..., 0].float()))
    sums = q.new_empty(len(PACKED), 2, SUMS)
    kernels = SimpleNamespace(
        pair_sums=lambda *_, plan, lifetimes: (sums, sums), type_gradient=lambda sums, *_: sums[..., :3].double()
    )
    monkeypatch.setattr(kv_lifetime.TypeGradient, "backend", kernels)
    plan = Plan.build(PACKED.take(tokens), PACKED.take(tokens), AttentionMask(), heads=HEADS.query)
    active = kv_lifetime.LifetimeRouting(NAtS(), planner).route(q, k, logits)
    narrowed = active.narrow(plan, tokens)
    assert narrowed.lifetime is not None
    assert narrowed.lifetime.device == META
    learned = active.start(q, logits)
    learned.observe(q, k, v, plan)
    learned.add(q, q, k, v, q, plan=plan, tokens=tokens)
    assert learned.gradients()[0].shape == logits.shape


def test_layers() -> None:
    x = meta(len(PACKED), 2, 16)
    rms_norm(x, meta(16), 1e-5).sum().backward()
    table = rotation_table(PACKED.position.to(META), inverse_frequencies(16, 10_000.0))
    apply_rope(x, *table).sum().backward()
    taps, weight = Taps.build(PACKED, Rows.packed([]), 3).to(META), meta(3, 2, 16)
    halo = meta(0, 2, 16)
    dout = convolve(x, halo, weight, taps)
    assert [y.shape for y in convolve_backward(dout, x, halo, weight, taps)] == [y.shape for y in (x, halo, weight)]


def test_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "on_gpu", lambda x: x.is_meta)
    labels = torch.empty(40, dtype=torch.int64, device=META)
    linear_cross_entropy(meta(40, 16), meta(50, 16), labels, chunk_bytes=50 * 4 * 7).sum().backward()


def test_routers() -> None:
    logits = routing_logits(meta(50, 16), meta(12, 16))
    bias = torch.empty(12, device=META)
    for score in ("softmax", "sigmoid"):
        router = ExpertRouter(experts=12, per_token=3, score=score, groups=4, groups_per_token=2)
        scores = router.scores(logits)
        chosen = router.choose(scores, bias)
        assert chosen.shape == (50, 3)
        (router.weights(scores, chosen).sum() + router.shares(scores).sum()).backward(retain_graph=True)
    for heads in (
        AttentionExperts(count=12, per_token=3),
        MixtureOfHeads(kv_heads=2, group=6, shared=1, per_token=2),
    ):
        found = heads.choose(meta(50, heads.logits, dtype=torch.float32), torch.empty(heads.choices, device=META))
        assert found.indices.shape == found.gates.shape
        found.gates.sum().backward()

"""The CUDA backend where there is no GPU: its operators are computed by plain torch, with their conventions.

Each takes and returns the same tensors as the real operator, and fails on inputs that the real one does not support.
The real operators are called on tensors without data.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.cuda import flash as cuda_flash
from farspan.kernels.cuda import operators as cuda_operators
from farspan.kernels.cuda.operators import Cudnn, Library, TorchFlash
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from tests.support import attention_cases, fake_flash_attn, oracle
from tests.support.attention_cases import Tensors, expect, run, run_parts

ROWS = {
    "one": Rows.packed([150]),
    "ragged": Rows.packed([1, 40, 3, 99], padding=5),
    "shuffled": attention_cases.ROWS["shuffled"],
}
ATTENTION_MASKS = [
    AttentionMask(),
    AttentionMask(causal=False),
    AttentionMask(window=30, sinks=2),
    AttentionMask(window=(3, 40, 3, 9), sinks=2),
    attention_cases.GRID,
]
TOLERANCE = oracle.RELATIVE_TOLERANCE[torch.bfloat16]


def check_operands(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[:2] == k.shape[:2] == v.shape[:2], "heads are not grouped"
    assert q.shape[3] == k.shape[3] == v.shape[3], "one head size"
    assert q.shape[3] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert min(q.shape[2], k.shape[2]) > 0
    assert not causal or q.shape[2] == k.shape[2], "causal is a square"


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    check_operands(q, k, v, causal)
    # [N, H, T, D] -> [N, T, H, D] and back
    out, lse = fake_flash_attn.padded_forward("aten", 256, *swapped(q, k, v), causal=causal, scale=scale)
    return out.transpose(1, 2), lse


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(q, k, v, causal)
    assert dout.shape == out.shape == q.shape
    found = fake_flash_attn.padded_backward(
        "aten", 256, *swapped(dout, q, k, v, out), lse=lse, causal=causal, scale=scale
    )
    dq, dk, dv = swapped(*found)
    return dq, dk, dv


def swapped(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


class FakeAten:
    """The four operators, by their schemas."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _scaled_dot_product_flash_attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, debug: bool, *, scale: float
    ) -> tuple[Any, ...]:
        self.called.append("flash")
        out, lse = attention(query, key, value, is_causal, scale)
        return out, lse, None, None, query.shape[2], key.shape[2], torch.zeros(2), torch.zeros(()), torch.zeros(0)

    def _scaled_dot_product_cudnn_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: None, compute_log_sumexp: bool, dropout_p: float,
        is_causal: bool, debug: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert compute_log_sumexp
        assert key.shape[2] > 1
        assert query.shape[3] <= 128
        self.called.append("cudnn")
        out, lse = attention(query, key, value, is_causal, scale)
        scalar = torch.zeros(())
        return out, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], scalar, scalar, None

    def _scaled_dot_product_flash_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_q: None,
        cum_k: None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, seed: Tensor, offset: Tensor, *,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert logsumexp.is_contiguous()
        return gradients(grad_out, query, key, value, out, logsumexp, is_causal, scale)

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, seed: Tensor,
        offset: Tensor, attn_bias: None, cum_q: None, cum_k: None, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, *, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert logsumexp.shape == (*query.shape[:3], 1)
        return gradients(grad_out, query, key, value, out, logsumexp.squeeze(-1), is_causal, scale)


@pytest.fixture(params=["flash", "cudnn"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeAten:
    """The operators on a Hopper GPU; with cuDNN installed it takes all regions that it supports."""
    fake = FakeAten()
    fake_flash_attn.install(monkeypatch)
    monkeypatch.setattr(cuda_operators, "aten", fake)
    monkeypatch.setattr(cuda_flash, "generation", lambda device: 9)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501 if request.param == "cudnn" else 91500)
    return fake


@pytest.mark.parametrize(
    ("heads", "head_dim", "value_dim"),
    [((4, 4), 16, 16), ((4, 2), 16, 16), ((4, 2), 20, 12), ((4, 1), 192, 128), ((4, 4), 20, 12)],
)
@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
def test_equals_the_formula(
    operators: FakeAten, attention_mask: AttentionMask, heads: tuple[int, int], head_dim: int, value_dim: int
) -> None:
    check_formula(attention_mask, heads, head_dim, value_dim)


def check_formula(attention_mask: AttentionMask, heads: tuple[int, int], head_dim: int, value_dim: int) -> None:
    for rows in ROWS.values():
        tensors = Tensors.random(len(rows), len(rows), heads, (head_dim, value_dim), torch.bfloat16)
        attention_cases.check(tensors, rows, rows, attention_mask, "cuda")


def test_each_operator_takes_the_regions_that_it_supports(operators: FakeAten, request: pytest.FixtureRequest) -> None:
    """One document is one triangle, without a mask; cuDNN is not asked for short regions or wide heads."""
    chosen = request.node.callspec.params["operators"]
    for tokens, width, expected in ((150, 16, chosen), (40, 16, "flash"), (150, 192, "flash")):
        rows = Rows.packed([tokens])
        tensors = Tensors.random(tokens, tokens, (2, 2), (width, width), torch.float16)
        operators.called.clear()
        run(tensors, Plan.build(rows, rows, AttentionMask(), heads=2), "cuda")
        assert operators.called == [expected]


@pytest.mark.parametrize(("queries", "keys"), [(90, 90), (90, 70), (70, 90)])
def test_causal_regions_that_are_no_squares(operators: FakeAten, queries: int, keys: int) -> None:
    """Aligned at the top left: query i sees keys 0 to i, and no query sees keys past the last query."""
    tensors = Tensors.random(queries, keys, dtype=torch.bfloat16)
    # [T, H, D] -> [1, H, T, D] and back
    q, k, v, dout = (x.transpose(0, 1).unsqueeze(0) for x in tensors)
    out, lse = cuda_flash.flash(q, k, v, causal=True, mask=None)
    got = [out, lse, *cuda_flash.flash_backward(dout, q, k, v, out, lse, causal=True, mask=None)]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril().expand(4, -1, -1)
    oracle.assert_close([x.squeeze(0).transpose(0, 1) for x in got], expect(tensors, mask), TOLERANCE)


def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(operators: FakeAten) -> None:
    """As in a ring: out and lse are of more keys than a call's own, and sums of parts are float32."""
    check_parts_over_disjoint_keys(scale=1)


def check_parts_over_disjoint_keys(scale: float) -> None:
    rows, tensors = Rows.packed([200]), Tensors.random(200, 200, dtype=torch.bfloat16)
    tensors = tensors._replace(q=tensors.q * scale)
    parts = list(torch.arange(200).split([70, 130]))
    plans = [Plan.build(rows, rows.take(part), AttentionMask(), heads=4) for part in parts]
    got, mask = run_parts(tensors, parts, plans, "cuda"), oracle.visible_mask(rows, rows, AttentionMask(), 4)
    assert all(x.dtype == torch.float32 for x in got)
    oracle.assert_close(got, expect(tensors, mask), TOLERANCE)


def test_unsupported_requests_are_refused() -> None:
    rows = Rows.packed([8])
    plan = Plan.build(rows, rows, AttentionMask(), heads=2)
    q = torch.zeros(8, 2, 16)
    with pytest.raises(ConfigError, match="takes bfloat16 and float16, not float32; use "):
        BACKENDS.get("cuda").forward(q, q, q, plan)
    blocks = BlockPartition.blocks(rows, 4)
    selection = BlockSelection.from_lists(torch.arange(8), blocks, torch.zeros(2, 8, 1, dtype=torch.int64))
    chosen = plan.with_selection(selection)
    with pytest.raises(ConfigError, match="selected by content"):
        BACKENDS.get("cuda").forward(q.half(), q.half(), q.half(), chosen)
    expiring = plan.with_lifetimes(torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(ConfigError, match="selected by content"):
        BACKENDS.get("cuda").forward(q.half(), q.half(), q.half(), expiring)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("library", [TorchFlash, Cudnn])
def test_the_real_operators_take_our_calls(library: Callable[[], Library], causal: bool) -> None:
    """On tensors without data: order, number and kinds of arguments, and the shapes of what comes back."""
    q, k, v, dout = (torch.empty(1, 4, 96, 64, dtype=torch.bfloat16, device="meta") for _ in range(4))
    out, lse = library().forward(q, k, v, causal=causal, scale=0.125)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((1, 4, 96), torch.float32)
    found = library().backward(dout, q, k, v, out, lse, causal=causal, scale=0.125)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, v)]

"""The CUDA backend where there is no GPU: its operators are computed by plain torch, with their conventions.

Each takes and returns the same tensors as the real operator, and fails on inputs that the real one does not support.
The real operators are called on tensors without data.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.cuda import flash as cuda_flash
from farspan.kernels.cuda import operators as cuda_operators
from farspan.kernels.cuda import varlen
from farspan.kernels.cuda.operators import Cudnn, Lengths, TorchFlash
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planning.plan import Plan
from farspan.parallel.layout import Shards
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


class FakeAten:
    """The four operators, by their schemas."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _flash_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, debug: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert not dropout_p
        self.called.append("flash")
        lengths = cum_q, cum_k, max_q, max_k
        out, lse = fake_flash_attn.packed("aten", 256, query, key, value, *lengths, scale, is_causal)
        return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)

    def _flash_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, seed: Tensor,
        unused: Tensor, *, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = grad_out, query, key, value, out, logsumexp, cum_q, cum_k, max_q, max_k
        return fake_flash_attn.packed_backward("aten", 256, *given, scale, is_causal)

    def _scaled_dot_product_cudnn_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: None, compute_log_sumexp: bool, dropout_p: float,
        is_causal: bool, debug: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert compute_log_sumexp
        self.called.append("cudnn")
        self._check(query, key, value, is_causal)
        operands = zip(*swapped(query, key, value), strict=True)
        found = [fake_flash_attn.forward(q, k, v, is_causal, scale) for q, k, v in operands]
        out, lse = (torch.stack(x) for x in zip(*found, strict=True))
        scalar = torch.zeros(())
        return *swapped(out), lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], scalar, scalar, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, seed: Tensor,
        offset: Tensor, attn_bias: None, cum_q: None, cum_k: None, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, *, scale: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert logsumexp.shape == (*query.shape[:3], 1)
        assert grad_out.shape == out.shape == query.shape
        assert grad_out.dtype == out.dtype == query.dtype
        self._check(query, key, value, is_causal)
        given = zip(*swapped(grad_out, query, key, value, out), logsumexp.squeeze(-1), strict=True)
        found = [fake_flash_attn.backward(dout, q, k, v, o, lse, is_causal, scale) for dout, q, k, v, o, lse in given]
        return tuple(swapped(*(torch.stack(x) for x in zip(*found, strict=True))))

    def _check(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert q.shape[:2] == k.shape[:2] == v.shape[:2], "heads are not grouped"
        assert q.shape[3] == k.shape[3] == v.shape[3], "one head size"
        assert q.shape[3] % 8 == 0
        assert q.shape[3] <= 128
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert q.shape[2] > 0
        assert k.shape[2] > 1
        assert not causal or q.shape[2] == k.shape[2], "causal is aligned top left"


def swapped(*tensors: Tensor) -> list[Tensor]:
    # [N, H, T, D] -> [N, T, H, D], or back
    return [x.transpose(1, 2) for x in tensors]


@pytest.fixture(params=["flash", "cudnn"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeAten:
    """The operators on a Hopper GPU; with cuDNN installed it takes all sequences that it supports."""
    fake = FakeAten()
    fake_flash_attn.install(monkeypatch)
    monkeypatch.setattr(cuda_operators, "aten", fake)
    monkeypatch.setattr(cuda_flash, "generation", lambda device: 9)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501 if request.param == "cudnn" else 91500)
    monkeypatch.setattr(varlen, "SHAPES", varlen.ShapeCounter(worth=1))
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


@pytest.mark.parametrize("causal", [True, False])
def test_gathered_keys_take_several_calls(operators: FakeAten, causal: bool) -> None:
    """Two chunks of a rank and the keys of all ranks, rank by rank; both chunks see the first keys of the document."""
    rows = Rows.packed([70, 330], padding=5)
    shards = Shards.build(rows, layout="zigzag", degree=2)
    queries, keys = rows.take(shards.index[0]), rows.take(shards.index.flatten())
    tensors = Tensors.random(len(queries), len(keys), (4, 2), (20, 12), torch.bfloat16)
    attention_cases.check(tensors, queries, keys, AttentionMask(causal=causal), "cuda")
    plan = Plan.build(queries, keys, AttentionMask(causal=causal), heads=4)
    operators.called.clear()
    *_, dk, dv = run(tensors, plan, "cuda")
    assert 1 + causal <= len(operators.called) <= 4
    assert {dk.dtype, dv.dtype} == ({torch.float32} if len(operators.called) > 1 else {torch.bfloat16}), "summed"


@pytest.mark.parametrize(("queries", "keys"), [(slice(0, 90), slice(0, 200)), (slice(100, 200), slice(0, 200))])
def test_queries_of_a_part_of_a_document(operators: FakeAten, queries: slice, keys: slice) -> None:
    """Its first queries see some of the keys; its last ones as many more keys as there are queries."""
    rows = Rows.packed([200])
    tensors = Tensors.random(queries.stop - queries.start, keys.stop, dtype=torch.bfloat16)
    attention_cases.check(tensors, rows.slice(queries), rows.slice(keys), AttentionMask(), "cuda")


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
def test_the_real_operators_take_our_calls(causal: bool) -> None:
    """On tensors without data: order, number and kinds of arguments, and the shapes of what comes back."""
    q, dout = (torch.empty(96, 4, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(100, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    lengths = Lengths.equal(4, 24, 25, q.device)
    for library, given in ((TorchFlash(), (lengths,)), (Cudnn(), ())):
        out, lse = library.forward(q, k, v, *given, causal=causal, scale=0.125)
        assert out.shape == q.shape
        assert (lse.shape, lse.dtype) == ((4, 96), torch.float32)
        found = library.backward(dout, q, k, v, out.to(q.dtype), lse, *given, causal=causal, scale=0.125)
        assert [x.shape for x in found] == [x.shape for x in (q, k, v)]

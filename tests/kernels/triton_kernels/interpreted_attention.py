"""The Triton backend, interpreted, against the oracle; `test_interpreted.py` runs this file in a process of its own."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.backend import BACKENDS, KernelRequest, choose_backend
from farspan.kernels.kinds.recurrent import Recurrent
from farspan.kernels.kinds.token_choice import TokenChoice
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import Access, Heads, Mechanism
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.merge import empty_partial, merge_
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import attention_launch
from farspan.kernels.triton_kernels.attention_launch import Shape, Shapes, shapes_for
from tests.kernels import test_sequence_attention as whole
from tests.support import attention_cases as contract
from tests.support import interpreter_bfloat16, oracle, truth
from tests.support.attention_cases import Tensors
from tests.support.sequence_shards import select

# Of several sizes, so that no kernel gets by with the tiles of another. The interpreter takes some 10 ms for a step of
# a loop, whatever its size: rows are few, and make two or three tiles.
SHAPES = Shapes(forward=Shape(32, 32, 4, 1), dq=Shape(64, 32, 4, 1), dkv=Shape(32, 64, 4, 1))
RAGGED = Rows.packed([1, 26, 3, 33], padding=5)
SHUFFLED = Rows.packed([40, 21], padding=3).take(torch.randperm(64, generator=torch.Generator().manual_seed(0)))
TOLERANCE = oracle.RELATIVE_TOLERANCE[torch.float32]
# Recurrent mechanisms have no softmax, and so are not of these kernels.
EXAMPLES = [x for x in whole.EXAMPLES if not isinstance(x.values[0], Recurrent)]
NAMES = ("out", "lse", "dq", "dk", "dv")


# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> None:
    interpreter_bfloat16.patch()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(width: int, value_width: int, dtype: torch.dtype) -> Shapes:
        return replace(SHAPES, dkv_in_turn=shapes_for(width, value_width, dtype).dkv_in_turn)

    monkeypatch.setattr(attention_launch, "shapes_for", small)


def run(tensors: Tensors, plan: Plan) -> list[Tensor]:
    return contract.run(tensors, plan, "triton")


def check(tensors: Tensors, plan: Plan, mask: Tensor) -> None:
    """Compare with the oracle in float64; `mask` is True where unmasked, bool `[heads, queries, keys]`."""
    assert torch.equal(plan.mask(), mask)
    for name, got, expected in zip(NAMES, run(tensors, plan), contract.expect(tensors, mask), strict=True):
        assert oracle.relative_error(got, expected) <= TOLERANCE, name


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_mechanism_equals_the_formula(mechanism: Mechanism) -> None:
    rows, heads = RAGGED, Heads(query=8, kv=2)
    inputs, dout = whole.random_inputs(mechanism, rows, heads, torch.float32)
    got = whole.run(mechanism, inputs, dout, rows, heads, "triton")
    for number, expected in enumerate(truth.expect(mechanism, inputs, dout, rows)):
        assert oracle.relative_error(got[number], expected) <= TOLERANCE, number


# One example of each mechanism without token choice: there a router weights the output outside of the kernels, which is
# compared in float32.
@pytest.mark.parametrize(
    "mechanism",
    list({type(x.values[0]): x for x in EXAMPLES if not isinstance(x.values[0], TokenChoice)}.values()),
)
def test_bfloat16_is_as_good_as_plain_attention(mechanism: Mechanism) -> None:
    """At most twice the error of attention whose every step is rounded to bfloat16."""
    rows, heads = SHUFFLED, Heads(query=8, kv=8 if Access.BLOCKS in mechanism.accesses else 1)
    inputs, dout = whole.random_inputs(mechanism, rows, heads, torch.bfloat16)
    exact = truth.expect(mechanism, inputs, dout, rows)
    got = whole.run(mechanism, inputs, dout, rows, heads, "triton")
    plain = plain_attention(inputs, dout, truth.visible(mechanism, inputs, rows))
    for name, result, rounded, expected in zip(NAMES, got[:5], plain, exact[:5], strict=True):
        assert oracle.rms_error(result, expected) <= 2 * oracle.rms_error(rounded, expected), name


def plain_attention(inputs: list[Tensor], dout: Tensor, mask: Tensor) -> list[Tensor]:
    """Attention as it is written down, every step in the dtype of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    q, k, v = leaves
    out, lse = oracle.attention(q, k, v, mask)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("attention_mask", contract.ATTENTION_MASKS, ids=str)
def test_masks_equal_the_formula(attention_mask: AttentionMask) -> None:
    rows, keys = contract.ROWS["ragged"], contract.ROWS["strided"]
    mask = oracle.visible_mask(rows, keys, attention_mask, 4)
    check(
        Tensors.random(len(rows), len(keys), (4, 2), 16, 16, torch.float32), plan_of(rows, keys, attention_mask), mask
    )


def plan_of(rows: Rows, keys: Rows, attention_mask: AttentionMask, selection: BlockSelection | None = None) -> Plan:
    return Plan.build(rows, keys, attention_mask, heads=4, selection=selection)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (9, 9)])
def test_rows_that_attend_to_nothing(queries: int, keys: int) -> None:
    """No rows at all, and rows that are all padding."""
    rows, other = (Rows.packed([], padding=9), Rows.packed([], padding=9)) if queries == 9 else (
        Rows.packed([queries]), Rows.packed([keys])
    )  # fmt: skip
    tensors = Tensors.random(queries, keys, (4, 2), 16, 16, torch.float32)
    backend = BACKENDS.get("triton")
    out, lse = backend.forward(tensors.q, tensors.k, tensors.v, plan_of(rows, other, AttentionMask()))
    assert out.shape == (queries, 4, 16)
    assert not out.any()
    assert lse.isneginf().all()
    gradients = backend.backward(
        tensors.dout, tensors.q, tensors.k, tensors.v, out, lse, plan_of(rows, other, AttentionMask())
    )
    for gradient, x in zip(gradients, (tensors.q, tensors.k, tensors.v), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def tile_selection(rows: Rows, tile: int = 16, block: int = 16) -> BlockSelection:
    blocks = BlockPartition.blocks(rows, block)
    query_block = BlockPartition.blocks(rows, tile).of(rows)
    # Two heads share a list, as the heads of one KV head may.
    mask = torch.rand(2, int(query_block.max()) + 1, blocks.count, generator=torch.Generator().manual_seed(1)) < 0.6
    return BlockSelection.from_parts(query_block, blocks, [mask])


def row_selection(rows: Rows) -> BlockSelection:
    tensors = Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float32)
    return select(MoBA(block=16, top_k=2), tensors.q, tensors.k, rows)


SELECTIONS = {"none": lambda rows: None, "tiles": tile_selection, "rows": row_selection}


@pytest.mark.parametrize("selection", ["none", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_sizes", [(64, 64), (128, 128), (192, 128), (256, 256), (24, 40)], ids=str)
def test_head_sizes_and_dtypes(head_sizes: tuple[int, int], dtype: torch.dtype, selection: str) -> None:
    """float32 as good as the contract wants, 16 bits at most twice as far off as plain attention in them."""
    rows = Rows.packed([3, 34], padding=2)
    chosen = SELECTIONS[selection](rows)
    tensors = Tensors.random(len(rows), len(rows), (4, 2), *head_sizes, dtype)
    plan = plan_of(rows, rows, AttentionMask(), chosen)
    mask = contract.mask_of(rows, rows, AttentionMask(), 4, chosen)
    exact, got = contract.expect(tensors, mask), run(tensors, plan)
    plain = plain_attention([tensors.q, tensors.k, tensors.v], tensors.dout, mask)
    for name, result, rounded, expected in zip(NAMES, got, plain, exact, strict=True):
        assert result.dtype == torch.float32, name
        if dtype == torch.float32:
            assert oracle.relative_error(result, expected) <= TOLERANCE, name
        else:
            assert oracle.rms_error(result, expected) <= 2 * oracle.rms_error(rounded, expected), name


@pytest.mark.parametrize("tile", [16, 20, 32])
def test_tile_selections_aligned_with_tiles_or_not(tile: int) -> None:
    for rows in (Rows.packed([70]), SHUFFLED)[: 1 if tile == 32 else 2]:
        selection = tile_selection(rows, tile)
        mask = oracle.visible_mask(rows, rows, AttentionMask(), 4) & oracle.selected_mask(selection, rows, 4)
        tensors = Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float32)
        check(tensors, plan_of(rows, rows, AttentionMask(), selection), mask)


@pytest.mark.parametrize("rows", [RAGGED, SHUFFLED], ids=["ragged", "shuffled"])
def test_lifetimes(rows: Rows) -> None:
    generator = torch.Generator().manual_seed(2)
    lifetime = rows.position + torch.randint(-1, 30, (2, len(rows)), generator=generator, dtype=torch.int32)
    plan = plan_of(rows, rows, AttentionMask(), None).with_lifetimes(lifetime)
    mask = oracle.visible_mask(rows, rows, plan.attention_mask, 4)
    mask &= (rows.position[:, None] <= lifetime[:, None, :]).repeat_interleave(2, dim=0)
    check(Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float32), plan, mask)


def test_some_rows_are_gathered_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results are bounded: here to those of about 7 rows at a time, wherever the rows of a block are."""
    rows = RAGGED
    tensors = Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float32)
    plan = plan_of(rows, rows, AttentionMask(), row_selection(rows))
    at_once = run(tensors, plan)
    monkeypatch.setattr(attention_launch, "SLOT_BYTES", 50 * 4 * 16)
    calls: list[slice] = []
    monkeypatch.setattr(attention_launch, "gathered_rows", lambda *a: noted(calls, *a))
    for name, got, expected in zip(NAMES, run(tensors, plan), at_once, strict=True):
        assert oracle.relative_error(got, expected) <= TOLERANCE, name
    assert len(calls) > 3 * 5


GATHERED_ROWS = attention_launch.gathered_rows


def noted(calls: list[slice], *arguments) -> Iterator:
    for gathered in GATHERED_ROWS(*arguments):
        calls.append(gathered.rows)
        yield gathered


@pytest.mark.parametrize("selection", SELECTIONS)
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(selection: str) -> None:
    """With out and lse that are merged over all parts; queries of the first document see nothing of the last part."""
    rows = Rows.packed([30, 30, 5], padding=4)
    tensors = Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float32)
    chosen = SELECTIONS[selection](rows)
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plans = [plan_of(rows, rows.take(part), AttentionMask(), chosen) for part in parts]
    out, lse = empty_partial(len(rows), 4, 16, like=tensors.q)
    for part, plan in zip(parts, plans, strict=True):
        merge_(out, lse, *attention_forward(tensors.q, tensors.k[part], tensors.v[part], plan, backend="triton"))
    dq, dk, dv = (torch.zeros_like(x) for x in (tensors.q, tensors.k, tensors.v))
    for part, plan in zip(parts, plans, strict=True):
        of_part = attention_backward(
            tensors.dout, tensors.q, tensors.k[part], tensors.v[part], out, lse, plan, backend="triton"
        )
        dq += of_part[0]
        dk[part], dv[part] = of_part[1], of_part[2]
    mask = contract.mask_of(rows, rows, AttentionMask(), 4, chosen)
    for name, got, expected in zip(NAMES, (out, lse, dq, dk, dv), contract.expect(tensors, mask), strict=True):
        assert oracle.relative_error(got, expected) <= TOLERANCE, name


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_bits_from_any_layout(selection: str) -> None:
    rows = Rows.packed([40])
    tensors = Tensors.random(40, 40, (4, 2), 16, 16, torch.float32)
    plan = plan_of(rows, rows, AttentionMask(), SELECTIONS[selection](rows))
    # Heads before rows, and a width that is not contiguous.
    order = (1, 0, 2) if selection == "none" else (2, 1, 0)
    other = Tensors(*(x.permute(order).contiguous().permute(order) for x in vars(tensors).values()))
    for name, a, b in zip(NAMES, run(tensors, plan), run(other, plan), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masked_keys_do_not_leak(selection: str) -> None:
    """A key changes only the queries that attend to it, even if its score would exceed all others."""
    rows = Rows.packed([20, 23], padding=3)
    tensors = Tensors.random(len(rows), len(rows), (4, 1), 16, 16, torch.float32)
    chosen = SELECTIONS[selection](rows)
    plan = plan_of(rows, rows, AttentionMask(window=9), chosen)
    out = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend="triton")[0]
    mask = contract.mask_of(rows, rows, AttentionMask(window=9), 4, chosen).any(dim=0)
    assert mask.any(dim=0)[:20].sum() > 5
    for key in mask.any(dim=0).nonzero().flatten()[::12].tolist():
        k, v = tensors.k.clone(), tensors.v.clone()
        k[key], v[key] = 1e6, -50.0
        changed = attention_forward(tensors.q, k, v, plan, backend="triton")[0]
        assert torch.equal(changed[~mask[:, key]], out[~mask[:, key]])
        assert not torch.equal(changed[mask[:, key]], out[mask[:, key]])


def test_lists_are_made_once_for_a_plan() -> None:
    rows = Rows.packed([40])
    tensors = Tensors.random(40, 40, (4, 2), 16, 16, torch.float32)
    plan = plan_of(rows, rows, AttentionMask())
    run(tensors, plan)
    made = {key: id(value) for key, value in plan.cache.items()}
    run(tensors, plan)
    assert {key: id(value) for key, value in plan.cache.items()} == made
    assert len(made) == 4  # terms, and lists for three kernels
    assert not plan.with_lifetimes(torch.zeros(2, 40, dtype=torch.int32)).cache


def test_unsupported_requests_are_refused() -> None:
    request = KernelRequest.of(MoBA(), torch.bfloat16, 256, 16)
    assert choose_backend("triton", torch.device("cpu"), request) == "triton"
    rows = Rows.packed([5])
    plan = plan_of(rows, rows, AttentionMask())
    for head_dim, dtype, message in ((16, torch.float64, "not float64"), (264, torch.float32, "up to 256, not 264")):
        tensors = Tensors.random(5, 5, (4, 2), head_dim, 16, dtype)
        with pytest.raises(ConfigError, match=message):
            run(tensors, plan)

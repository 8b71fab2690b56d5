"""The Triton backend, interpreted, against the oracle; `test_interpreted.py` runs this file in a process of its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton.runtime.interpreter import GridExecutor  # pyright: ignore[reportMissingImports]

from farspan.errors import ConfigError
from farspan.kernels.attention import attention_forward
from farspan.kernels.backend import KernelRequest, choose_backend
from farspan.kernels.kinds.recurrent import Recurrent
from farspan.kernels.kinds.token_choice import TokenChoice
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.mechanism import Access, Heads, Mechanism
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import attention_launch, gathered_launch
from farspan.kernels.triton_kernels.attention_launch import Shape, Shapes, shapes_for
from tests.support import attention_cases as contract
from tests.support import oracle, triton_interpreter, truth
from tests.support.attention_cases import Tensors
from tests.support.far_rows import far_rows
from tests.support.mechanisms import SCORES, attend, examples, inputs_of, with_scores
from tests.support.sequence_shards import select

# Of several sizes, so that no kernel gets by with the tiles of another. The interpreter takes some 10 ms for a step of
# a loop, whatever its size: rows are few, and make two or three tiles.
SHAPES = Shapes(forward=Shape(32, 32, 4, 1), dq=Shape(64, 32, 4, 1), dkv=Shape(32, 64, 4, 1))
RAGGED = Rows.packed([1, 26, 3, 33], padding=5)
SHUFFLED = Rows.packed([40, 21], padding=3).take(torch.randperm(64, generator=torch.Generator().manual_seed(0)))
TOLERANCE = oracle.RELATIVE_TOLERANCE[torch.float32]
# Recurrent mechanisms have no softmax, and so are not of these kernels.
EXAMPLES = [x for x in examples() if not isinstance(x, Recurrent)]
SAME = Shape(32, 32, 4, 1)
NAMES = ("out", "lse", "dq", "dk", "dv")

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> None:
    triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(width: int, value_width: int, dtype: torch.dtype) -> Shapes:
        return replace(SHAPES, dkv_in_turn=shapes_for(width, value_width, dtype).dkv_in_turn)

    monkeypatch.setattr(attention_launch, "shapes_for", small)
    monkeypatch.setattr(gathered_launch, "shapes_for", small)


def run(tensors: Tensors, plan: Plan) -> list[Tensor]:
    return contract.run(tensors, plan, "triton")


def check(tensors: Tensors, plan: Plan, mask: Tensor) -> None:
    """Compare with the oracle in float64; `mask` is True where unmasked, bool `[heads, queries, keys]`."""
    assert torch.equal(plan.mask(), mask)
    oracle.assert_close(run(tensors, plan), contract.expect(tensors, mask), TOLERANCE)


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_mechanism_equals_the_formula(mechanism: Mechanism) -> None:
    heads = fewest_heads(mechanism, kv=2)
    inputs = inputs_of(mechanism, len(RAGGED), heads, dtype=torch.float32)
    got = attend(mechanism, RAGGED, heads, inputs, backend="triton")
    oracle.assert_close(got, truth.expect(mechanism, inputs, RAGGED), TOLERANCE)


def fewest_heads(mechanism: Mechanism, kv: int | None = None) -> Heads:
    """4 query heads, or 8 for windows of 8 heads; as many KV heads, if `kv` does not say how many."""
    of = (Heads(query=n, kv=kv or n) for n in (4, 8))
    return next(heads for heads in of if mechanism.unsupported_reason(heads, len(RAGGED)) is None)


# One example of each mechanism without token choice: there a router weights the output outside of the kernels, which is
# compared in float32.
@pytest.mark.parametrize(
    "mechanism",
    list({type(x): x for x in EXAMPLES if not isinstance(x, TokenChoice)}.values()),
    ids=str,
)
def test_bfloat16_is_as_good_as_plain_attention(mechanism: Mechanism) -> None:
    """At most twice the error of attention whose every step is rounded to bfloat16."""
    rows, heads = SHUFFLED, fewest_heads(mechanism, kv=None if Access.BLOCKS in mechanism.accesses else 1)
    inputs = inputs_of(mechanism, len(rows), heads, dtype=torch.bfloat16)
    exact = truth.expect(mechanism, inputs, rows)[:5]
    got = attend(mechanism, rows, heads, inputs, backend="triton")[:5]
    q, k, v, *_, dout = inputs
    plain = plain_attention(Tensors(q, k, v, dout), truth.visible(mechanism, inputs, rows))
    check_rounding(got, plain, exact)


def plain_attention(tensors: Tensors, mask: Tensor) -> list[Tensor]:
    """Attention as it is written down, every step in the dtype of the inputs."""
    q, k, v = leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out, lse = oracle.attention(q, k, v, mask)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors.dout)]


def check_rounding(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """At most twice the error of plain attention."""
    for name, result, rounded, expected in zip(NAMES, got, plain, exact, strict=True):
        assert oracle.rms_error(result, expected) <= 2 * oracle.rms_error(rounded, expected), name


@pytest.mark.parametrize("attention_mask", contract.ATTENTION_MASKS, ids=str)
def test_masks_equal_the_formula(attention_mask: AttentionMask) -> None:
    rows, keys = contract.ROWS["ragged"], contract.ROWS["strided"]
    mask = oracle.visible_mask(rows, keys, attention_mask, 4)
    check(random_tensors(rows, keys), plan_of(rows, keys, attention_mask), mask)


def random_tensors(queries: Rows, keys: Rows, heads: tuple[int, int] = (4, 2)) -> Tensors:
    return Tensors.random(len(queries), len(keys), heads, dtype=torch.float32)


def plan_of(rows: Rows, keys: Rows, attention_mask: AttentionMask, selection: BlockSelection | None = None) -> Plan:
    return Plan.build(rows, keys, attention_mask, heads=4, selection=selection)


@pytest.mark.parametrize(("queries", "keys", "padding"), [(0, 5, 0), (5, 0, 0), (0, 0, 0), (0, 0, 9)])
def test_rows_that_attend_to_nothing(queries: int, keys: int, padding: int) -> None:
    """No rows at all, and rows that are all padding."""
    contract.check_blind(Rows.packed([queries], padding), Rows.packed([keys], padding), "triton")


def test_padding_in_tiles_of_queries_that_see_all_of_a_tile_of_keys() -> None:
    """Full tiles do not look for padding, and it still attends to nothing."""
    rows = Rows.packed([40], padding=5)
    check(
        random_tensors(rows, rows),
        plan_of(rows, rows, AttentionMask()),
        oracle.visible_mask(rows, rows, AttentionMask(), 4),
    )


def tile_selection(rows: Rows, tile: int = 16, block: int = 16) -> BlockSelection:
    blocks = BlockPartition.blocks(rows, block)
    query_block = BlockPartition.blocks(rows, tile).of(rows)
    # Two heads share a list, as the heads of one KV head may.
    mask = torch.rand(2, int(query_block.max()) + 1, blocks.count, generator=torch.Generator().manual_seed(1)) < 0.6
    return BlockSelection.from_parts(query_block, blocks, [(slice(0, blocks.count), mask)], heads=len(mask))


def row_selection(rows: Rows) -> BlockSelection:
    tensors = random_tensors(rows, rows)
    return select(MoBA(block=16, top_k=2), tensors.q, tensors.k, rows)


SELECTIONS = {"none": lambda rows: None, "tiles": tile_selection, "rows": row_selection}


@pytest.mark.parametrize(("block", "tokens"), [(16, 9), (24, 40), (32, 31), (32, 40), (32, 72), (64, 33), (64, 70)])
def test_blocks_of_rows_around_tiles_of_keys(block: int, tokens: int) -> None:
    """Shorter than a tile of keys, as long, and longer; a sequence of part of a block; a short last block in place."""
    rows, mask = Rows.packed([tokens]), AttentionMask()
    tensors = random_tensors(rows, rows)
    chosen = select(MoBA(block=block, top_k=2), tensors.q, tensors.k, rows)
    check(tensors, plan_of(rows, rows, mask, chosen), contract.mask_of(rows, rows, mask, 4, chosen))


@pytest.mark.parametrize("window", [31, 32, 33])
def test_edges_of_windows_and_lifetimes_around_tiles(window: int) -> None:
    """A window, its sinks and the lives of keys end just before, at and just after the end of a tile."""
    rows = Rows.packed([window + 33])
    mask = AttentionMask(window=window, sinks=max(window - 32, 0))
    check(random_tensors(rows, rows), plan_of(rows, rows, mask), oracle.visible_mask(rows, rows, mask, 4))
    heads, mechanism = Heads(query=2, kv=1), NAtS(window=window)
    inputs = inputs_of(mechanism, len(rows), heads, dtype=torch.float32)
    got = attend(mechanism, rows, heads, inputs, backend="triton")
    oracle.assert_close(got, truth.expect(mechanism, inputs, rows), TOLERANCE)


@pytest.mark.parametrize("heads", [(6, 2), (5, 1), (3, 3)])
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    """By tiles and by rows, with heads of no power of two."""
    rows, mask = Rows.packed([3, 34], padding=2), AttentionMask()
    tensors = random_tensors(rows, rows, heads)
    for chosen in (None, select(MoBA(block=16, top_k=2), tensors.q, tensors.k, rows)):
        plan = Plan.build(rows, rows, mask, heads=heads[0], selection=chosen)
        check(tensors, plan, contract.mask_of(rows, rows, mask, heads[0], chosen))


# Hidden scores overflow before the mask drops them.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("selection", ["none", "rows"])
def test_scores_of_any_size(selection: str, scores: str) -> None:
    """Where rows select, softmax goes on from block to block through memory."""
    rows = Rows.packed([3, 34], padding=2)
    chosen = SELECTIONS[selection](rows)
    q, k, v, dout = random_tensors(rows, rows)
    tensors = Tensors(*with_scores(scores, (q, k, v, dout)))
    got = run(tensors, plan_of(rows, rows, AttentionMask(), chosen))
    expected = contract.expect(tensors, contract.mask_of(rows, rows, AttentionMask(), 4, chosen))
    oracle.assert_close(got, expected, oracle.tolerance(torch.float32, SCORES[scores]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("selection", ["none", "rows"])
def test_what_is_not_finite_stays_in_its_document(selection: str) -> None:
    """Padding, too, reaches nothing; and in its own document a NaN is not taken for a row that attends to nothing."""
    rows = Rows.packed([9, 12], padding=5)
    tensors, chosen = random_tensors(rows, rows), SELECTIONS[selection](rows)
    expected, document = run(tensors, plan_of(rows, rows, AttentionMask(), chosen)), rows.document
    for nth in range(4):
        spoiled = Tensors(*(x.clone() for x in tensors))
        for x in spoiled:
            x[document < 0] = float("inf")
        spoiled[nth][3] = float("nan")
        found = run(spoiled, plan_of(rows, rows, AttentionMask(), chosen))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[document != 0], b[document != 0])
        assert all(x[3].isnan().all() for x in found[2:])
    # The same in a plan of one document, where the kernels alone see to it.
    one = Rows.packed([9])
    spoiled = random_tensors(one, one)
    spoiled.v[3] = float("nan")
    out, _, dq, *_ = run(spoiled, plan_of(one, one, AttentionMask(), SELECTIONS[selection](one)))
    assert out[3].isnan().all()
    assert dq[3].isnan().all()


@pytest.mark.parametrize("selection", ["none", "rows"])
@pytest.mark.parametrize(
    ("head_sizes", "dtype"),
    [
        *(((64, 64), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((size, torch.float32) for size in ((128, 128), (192, 128), (256, 256), (24, 40))),
        *zip(((128, 128), (192, 128), (256, 256), (24, 40)), 2 * [torch.bfloat16, torch.float16], strict=True),
    ],
    ids=str,
)
def test_head_sizes_and_dtypes(head_sizes: tuple[int, int], dtype: torch.dtype, selection: str) -> None:
    """float32 as good as the contract wants, 16 bits at most twice as far off as plain attention in them."""
    rows = Rows.packed([3, 34], padding=2)
    chosen = SELECTIONS[selection](rows)
    tensors = Tensors.random(len(rows), len(rows), dims=head_sizes, dtype=dtype)
    mask = contract.mask_of(rows, rows, AttentionMask(), 4, chosen)
    exact, got = contract.expect(tensors, mask), run(tensors, plan_of(rows, rows, AttentionMask(), chosen))
    assert all(result.dtype == torch.float32 for result in got)
    if dtype == torch.float32:
        oracle.assert_close(got, exact, TOLERANCE)
    else:
        check_rounding(got, plain_attention(tensors, mask), exact)


@pytest.mark.parametrize("selection", ["none", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_tiles_are_float32(dtype: torch.dtype, selection: str) -> None:
    """Small integers, whose products with equal probabilities are exact in 16 bits: only their sums need more."""
    rows, mask = Rows.packed([64]), AttentionMask(causal=False)
    q, k, large, small = (torch.arange(64 * n * 16).view(64, n, 16) * 37 % 211 for n in (4, 2, 2, 4))
    q, k, small = q % 15 - 7, k % 15 - 7, small % 3 - 1
    # One column, so that its products are those of out.
    large[..., 1:] = 0
    blocks = BlockPartition.blocks(rows, 32)
    everything = BlockSelection.from_parts(
        torch.arange(64), blocks, [(slice(0, 2), torch.ones(4, 64, 2, dtype=torch.bool))], heads=4
    )
    plan = Plan.build(rows, rows, mask, heads=4, selection=everything if selection == "rows" else None)
    # Each value of the first tile of keys has its opposite in the second: what backward subtracts is 0. Either values
    # are large and their gradients are not, or the other way round.
    for query, key, value, dout in (
        (q, 0 * k, large, small),
        (0 * q, k, small[:, :2], large.repeat(1, 2, 1)),
    ):
        value = torch.cat((value[:32], -value[:32]))
        tensors = Tensors(*(x.to(dtype) for x in (query, key, value, dout)))
        check(tensors, plan, torch.ones(4, 64, 64).bool())


@pytest.mark.parametrize("tile", [16, 20, 32])
def test_tile_selections_aligned_with_tiles_or_not(tile: int) -> None:
    for rows in (Rows.packed([70]), SHUFFLED)[: 1 if tile == 32 else 2]:
        selection = tile_selection(rows, tile)
        mask = oracle.visible_mask(rows, rows, AttentionMask(), 4) & oracle.selected_mask(selection, rows, 4)
        check(random_tensors(rows, rows), plan_of(rows, rows, AttentionMask(), selection), mask)


@pytest.mark.parametrize("rows", [RAGGED, SHUFFLED], ids=["ragged", "shuffled"])
def test_lifetimes(rows: Rows) -> None:
    generator = torch.Generator().manual_seed(2)
    lifetime = rows.position + torch.randint(-1, 30, (2, len(rows)), generator=generator, dtype=torch.int32)
    plan = plan_of(rows, rows, AttentionMask(), None).with_lifetimes(lifetime)
    alive = (rows.position[:, None] <= lifetime[:, None, :]).repeat_interleave(2, dim=0)
    check(random_tensors(rows, rows), plan, oracle.visible_mask(rows, rows, plan.attention_mask, 4) & alive)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(selection: str) -> None:
    """With out and lse that are merged over all parts; queries of the first document see nothing of the last part."""
    rows = Rows.packed([30, 30, 5], padding=4)
    tensors, chosen = random_tensors(rows, rows), SELECTIONS[selection](rows)
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plans = [plan_of(rows, rows.take(part), AttentionMask(), chosen) for part in parts]
    mask = contract.mask_of(rows, rows, AttentionMask(), 4, chosen)
    got = contract.run_parts(tensors, parts, plans, "triton")
    oracle.assert_close(got, contract.expect(tensors, mask), TOLERANCE)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_bits_from_any_layout(selection: str) -> None:
    """Of a width that fills no tile; what lies beyond it in memory does not matter."""
    rows = Rows.packed([40])
    tensors = Tensors.random(40, 40, dims=(24, 24), dtype=torch.float32)
    plan = plan_of(rows, rows, AttentionMask(), SELECTIONS[selection](rows))
    # Heads before rows, and a width that is not contiguous.
    order = (1, 0, 2) if selection == "none" else (2, 1, 0)
    turned = Tensors(*(x.permute(order).contiguous().permute(order) for x in tensors))
    amid_nan = Tensors(*(functional.pad(x, (0, 8), value=torch.nan)[..., :24] for x in tensors))
    expected = run(tensors, plan)
    for other in (turned, amid_nan):
        for name, a, b in zip(NAMES, expected, run(other, plan), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masked_keys_do_not_leak(selection: str) -> None:
    """A key changes only the queries that attend to it, even if its score would exceed all others."""
    rows = Rows.packed([20, 23], padding=3)
    tensors, chosen = random_tensors(rows, rows, (4, 1)), SELECTIONS[selection](rows)
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


@pytest.mark.parametrize("order", ["in order", "gathered"])
@pytest.mark.parametrize("selection", ["none", "rows"])
def test_rows_beyond_two_billion_elements(selection: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place in a tensor is more than int32 holds, from some 100,000 tokens on where q, k and v share rows."""
    # The interpreter copies each storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    rows = Rows.packed([70])
    if order == "gathered":
        rows = rows.take(torch.randperm(70, generator=torch.Generator().manual_seed(0)))
    tensors = Tensors.random(70, 70, (2, 1), dtype=torch.float16)
    chosen = select(MoBA(block=16, top_k=2), tensors.q, tensors.k, rows) if selection == "rows" else None
    plan = Plan.build(rows, rows, AttentionMask(), heads=2, selection=chosen)
    expected = run(tensors, plan)
    for got, near in zip(run(Tensors(*(far_rows(x) for x in tensors)), plan), expected, strict=True):
        assert torch.equal(got, near)


def test_lists_are_made_once_for_a_plan() -> None:
    rows = Rows.packed([40])
    tensors = random_tensors(rows, rows)
    plan = plan_of(rows, rows, AttentionMask())
    run(tensors, plan)
    made = {key: id(value) for key, value in plan.shared.items()}
    run(tensors, plan)
    assert {key: id(value) for key, value in plan.shared.items()} == made
    assert len(made) == 4  # terms, and lists for three kernels


def test_kernels_of_one_shape_have_lists_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all kernels of wide float32 heads: lists of queries and of keys differ where their tiles do not."""
    monkeypatch.setattr(attention_launch, "shapes_for", lambda *_: Shapes(forward=SAME, dq=SAME, dkv=SAME))
    rows = Rows.packed([70])
    plan = Plan.build(rows, rows, AttentionMask(), heads=2)
    check(random_tensors(rows, rows, (2, 1)), plan, oracle.visible_mask(rows, rows, AttentionMask(), 2))
    assert len(plan.shared) == 3  # terms, and lists for each side


def test_unsupported_requests_are_refused() -> None:
    request = KernelRequest.of(MoBA(), torch.bfloat16, 256, 16)
    assert choose_backend("triton", torch.device("cpu"), request) == "triton"
    rows = Rows.packed([5])
    plan = plan_of(rows, rows, AttentionMask())
    for head_dim, dtype, message in ((16, torch.float64, "not float64"), (264, torch.float32, "up to 256, not 264")):
        tensors = Tensors.random(5, 5, dims=(head_dim, 16), dtype=dtype)
        with pytest.raises(ConfigError, match=message):
            run(tensors, plan)

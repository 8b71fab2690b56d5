"""FlexAttention as a baseline: its masks are those of our mechanisms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from farspan.errors import ConfigError
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.spans import Spans
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.plan import Plan
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.baselines import flex
from farspan.tools.bench.baselines.flex import Flex, block_mask, of_positions, pattern_mask
from farspan.tools.bench.case import Shape, inputs_of
from farspan.tools.bench.check import check_rows, excess
from farspan.tools.bench.contenders import REFERENCE, Ours

CPU = torch.device("cpu")
HEADS = Heads(query=4, kv=2)
SHAPE = Shape(heads=HEADS, head_dim=16, value_dim=16, dtype=torch.float32, device=CPU)
ROWS = {
    "full blocks": Rows.packed([512]),
    "a last block of 30": Rows.packed([414]),
    "packed": Rows.packed([1, 200, 128, 170], padding=13),
    "packed blocks": Rows.packed([128, 256, 128]),
}
PATTERNS = [
    BlockSparse(block=128, density=0.5),
    BlockSparse(block=128, density=0.5, causal=False),
    BlockSparse(block=32, density=0.3),
    BlockSparse(block=150, density=0.6, causal=False),
    BlockSparse(block=128, mask=("1", "11", "011", "1001"), causal=False),
]


def shown(mask: BlockMask, heads: int, tokens: int) -> Tensor:
    return create_mask(mask.mask_mod, 1, heads, tokens, tokens, device="cpu")[0]


def plan_of(mechanism: BlockSparse, rows: Rows) -> Plan:
    q, k = torch.randn(len(rows), HEADS.query, 8), torch.randn(len(rows), HEADS.kv, 8)
    selection = mechanism.route(rows, HEADS, q, k).selection
    return Plan.build(rows, rows, mechanism.attention_mask(), heads=HEADS.query, selection=selection)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("mechanism", PATTERNS, ids=str)
def test_a_pattern_is_shown_as_it_is(mechanism: BlockSparse, rows: Rows) -> None:
    mask = pattern_mask(mechanism, rows, HEADS, CPU)
    found, expected = shown(mask, HEADS.query, len(rows)), plan_of(mechanism, rows).mask()
    assert expected.any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mechanism", [Window(window=100, sinks=4), PATTERNS[0]], ids=str)
def test_functions_of_pairs_change_nothing_in_place(mechanism: Masked) -> None:
    """torch's compiler cannot make a part of a kernel of one that does."""
    rows = ROWS["packed"]
    if isinstance(mechanism, BlockSparse):
        mask = pattern_mask(mechanism, rows, HEADS, CPU)
    else:
        mask = block_mask(of_positions(mechanism.attention_mask(), rows, CPU), None, rows, CPU)
    traced = make_fx(mask.mask_mod)(*(torch.tensor([i]) for i in (0, 1, 300, 290)))
    assert {str(node.target) for node in traced.graph.nodes} >= {"aten.ge.Scalar", "aten.bitwise_and.Tensor"}
    for node in traced.graph.nodes:
        assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable), node


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("mechanism", [Dense(), Dense(causal=False), Window(window=100, sinks=4)], ids=str)
def test_visibility_is_shown_as_it_is(mechanism: Masked, rows: Rows) -> None:
    mask = block_mask(of_positions(mechanism.attention_mask(), rows, CPU), None, rows, CPU)
    assert torch.equal(shown(mask, 1, len(rows))[0], mechanism.attention_mask().mask(rows, rows))


def test_blocks_that_are_full_or_empty_are_known() -> None:
    """512 tokens are 4 by 4 blocks: 6 below the diagonal, and 4 on it, whose pairs are looked at one by one."""
    mask = block_mask(of_positions(Dense().attention_mask(), ROWS["full blocks"], CPU), None, ROWS["full blocks"], CPU)
    assert mask.full_kv_num_blocks is not None
    assert (int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())) == (4, 6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mechanism", [Dense(), Window(window=100, sinks=4), *PATTERNS[:3]], ids=str)
def test_it_computes_the_same_function(mechanism: Masked, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    rows = check_rows(300, packed)
    with connected(Ranks(), CPU), torch.no_grad():
        attention = Flex().plan(mechanism, rows, SHAPE)
        inputs = [x.detach() for x in inputs_of(mechanism, 300, SHAPE)]
        expected = Ours(REFERENCE).plan(mechanism, rows, SHAPE)(*inputs)
        assert excess(attention(*inputs), expected.double(), None, 1.0) == ""


@pytest.mark.parametrize("mechanism", [MoBA(), NAtS.examples()[0], Spans.examples()[0]], ids=str)
def test_masks_that_depend_on_content_or_head_are_refused(mechanism: Mechanism) -> None:
    with pytest.raises(ConfigError, match="torch_flex is compared where"):
        Flex().plan(mechanism, Rows.packed([64]), replace(SHAPE, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_every_mask_and_size_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch compiles one function for by default."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()
    with connected(Ranks(), CPU), torch.no_grad():
        for tokens in range(128, 128 + 12 * 16, 16):
            rows = Rows.packed([tokens])
            q, k, v, *_ = (x.detach() for x in inputs_of(Dense(), tokens, SHAPE))
            assert Flex().plan(Dense(), rows, SHAPE)(q, k, v).shape == (tokens, HEADS.query, 16)
    flex._compiled.cache_clear()
    torch.compiler.reset()

"""The Python API against torch's own attention and against one process."""

import re
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import farspan
from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.parallel.context_parallel import api
from farspan.parallel.layout import Shards
from tests.support.rank_pool import Pools

DOCUMENTS = ((61, 40, 28), (129,))
"""Of each sequence of a batch: an odd number of tokens, so that the last ranks have padding."""
STACKS = {"accelerate", "deepspeed", "megatron", "submitit", "tensorboard", "transformers"}
BLOCKS = {"block": 16, "top_k": 2}


def inputs(*shape: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q with four heads, k and v with two, float64."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(*shape, heads, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )  # pyright: ignore[reportReturnType]


def test_a_batch_of_documents_is_attended_to_as_by_torch() -> None:
    q, k, v = inputs(2, 129)
    dout = torch.randn_like(q)
    out = farspan.attention(q, k, v, documents=DOCUMENTS)
    halves = torch.tensor([[60, 69], [100, 29]])
    assert torch.equal(
        farspan.attention(q, k, v, documents=halves), farspan.attention(q, k, v, documents=halves.tolist())
    )
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    mask = torch.zeros(2, 1, 129, 129, dtype=torch.bool)
    for sequence, lengths in enumerate(DOCUMENTS):
        mask[sequence, 0] = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]  # [B, T, H, D] -> [B, H, T, D]
    wanted = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for gradient, of_torch in zip(gradients, torch.autograd.grad(wanted, (q, k, v), dout), strict=True):
        torch.testing.assert_close(gradient, of_torch, rtol=1e-11, atol=1e-11)


def test_shards_are_a_layout_of_ones_own() -> None:
    q, k, v = inputs(129)
    order = torch.randperm(129, generator=torch.Generator().manual_seed(6))
    shards = Shards(rows=Rows.packed(DOCUMENTS[0]), index=order[None])
    out = farspan.ContextParallel().attention(q[order], k[order], v[order], documents=shards)
    wanted = farspan.attention(q, k, v, documents=DOCUMENTS[0])
    torch.testing.assert_close(out, wanted[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mechanism", ["dense", "moba", "lightning"])
def test_autocast_rounds_inputs_alone(mechanism: str) -> None:
    """As for torch's own attention; what is summed inside is as precise as without."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(129))
    k, v = k.repeat_interleave(2, dim=-2), v.repeat_interleave(2, dim=-2)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    wanted = farspan.attention(*rounded, mechanism=mechanism)  # pyright: ignore
    dout = torch.randn_like(wanted)
    of_rounded = torch.autograd.grad(wanted, rounded, dout)
    with torch.autocast("cpu", torch.bfloat16):
        out = farspan.attention(q, k, v.bfloat16(), mechanism=mechanism)  # as after rotation, which is in float32
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        assert farspan.attention(*inputs(8)).dtype == torch.float64
    assert torch.equal(out, wanted)
    for gradient, of_bfloat16 in zip(gradients, of_rounded, strict=True):
        assert torch.equal(gradient, of_bfloat16.float())


def test_attention_stays_outside_of_compiled_graphs() -> None:
    """What `eager` does to graphs, tests/trainer/model/test_compile.py has."""
    q, k, v = inputs(8)
    with (
        patch.object(torch.compiler, "is_compiling", lambda: True),
        patch.object(torch.compiler, "disable", side_effect=lambda function: function) as disable,
    ):
        farspan.attention(q, k, v)
        farspan.ContextParallel().attention(q, k, v)
    assert disable.call_count == 3, "a call of the function is one of the method, too"


def of_rank(
    inputs: tuple[Tensor, ...], dout: Tensor, options: dict[str, object], batched: bool
) -> tuple[list[Tensor], Tensor, dict[str, int]]:
    """On a rank: the output and the gradients of all tokens, its position ids, and what it sent."""
    cp = farspan.ContextParallel(dist.group.WORLD, options["strategy"], options["layout"], node_ranks=2)  # pyright: ignore
    dim, documents = int(batched), DOCUMENTS[0]
    local = [cp.shard(x, documents=documents, dim=dim).requires_grad_() for x in inputs]
    mechanism = farspan.mechanism("moba", **BLOCKS) if options["mechanism"] == "moba" else options["mechanism"]
    out = cp.attention(*local, mechanism=mechanism, documents=documents)  # pyright: ignore
    gradients = torch.autograd.grad(out, local, cp.shard(dout, documents=documents, dim=dim))
    whole = [cp.unshard(x.detach(), documents=documents, dim=dim) for x in (out, *gradients)]
    return whole, cp.position_ids(129, documents=documents), dict(cp.traffic.sent)


@pytest.mark.parametrize(
    ("strategy", "layout", "mechanism", "ranks_", "batched"),
    [
        ("ring", "zigzag", "dense", 2, False),
        ("ring", "striped", "moba", 2, True),
        ("auto", "zigzag", "moba", 4, False),
        ("double_ring", "balanced", "window", 4, False),
        ("ulysses", "contiguous", "lightning", 2, True),
        ("fetch", "zigzag", "lightning", 2, False),
    ],
)
def test_ranks_of_a_group_attend_as_one_process(
    ranks: Pools, strategy: str, layout: str, mechanism: str, ranks_: int, batched: bool
) -> None:
    q, k, v = (x.detach() for x in inputs(*([3] if batched else []), 129))
    if mechanism == "lightning":
        k, v = (x.repeat_interleave(2, dim=-2) for x in (k, v))
    dout = torch.randn_like(q)
    options = {"strategy": strategy, "layout": layout, "mechanism": mechanism}
    alone = [x.requires_grad_() for x in (q, k, v)]
    built = farspan.mechanism("moba", **BLOCKS) if mechanism == "moba" else mechanism
    out = farspan.attention(*alone, mechanism=built, documents=DOCUMENTS[0])
    wanted = [out, *torch.autograd.grad(out, alone, dout)]
    for whole, positions, sent in ranks(ranks_).run(of_rank, tuple(x.detach() for x in alone), dout, options, batched):
        for found, expected in zip(whole, wanted, strict=True):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-11)
        assert positions.dtype == torch.int64
        assert len(positions) == -(-129 // (2 * ranks_)) * 2 or layout in ("contiguous", "striped", "balanced")
        assert sum(sent.values()) > 0


@pytest.mark.parametrize(
    "mechanism",
    [
        farspan.mechanism("dense"),
        farspan.mechanism("window", window=20),
        farspan.mechanism("moba", **BLOCKS),
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("last", [1, 17])
def test_the_last_tokens_attend_to_all_keys(mechanism: Mechanism, batched: bool, last: int) -> None:
    q, k, v = inputs(*([2] if batched else []), 129)
    documents = DOCUMENTS if batched else DOCUMENTS[0]
    cut = q[..., -last:, :, :]
    dout = torch.randn_like(cut)
    whole = farspan.attention(q, k, v, mechanism=mechanism, documents=documents)[..., -last:, :, :]
    out = farspan.attention(cut, k, v, mechanism=mechanism, documents=documents)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(whole, (q, k, v), dout)
    for gradient, expected in zip(torch.autograd.grad(out, (q, k, v), dout), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("mechanism", "why"),
    [
        ("lightning", "a recurrence cannot go on"),
        ("mosa", "its router chooses among all"),
        ("nats", "its router chooses among all"),
        ("sparge", "queries of a tile select together"),
        ("vmoba", "is not causal"),
    ],
)
def test_mechanisms_that_need_all_queries_refuse_the_last(mechanism: str, why: str) -> None:
    q, k, v = (torch.zeros(9, 4, 8) for _ in range(3))
    with pytest.raises(ConfigError, match=f"{why}.*without a KV cache"):
        farspan.attention(q[-1:], k, v, mechanism=mechanism)


def test_plans_of_a_kv_cache_do_not_pile_up() -> None:
    cp = farspan.ContextParallel()
    q, k, v = (torch.zeros(40, 2, 8) for _ in range(3))
    for tokens in range(20, 40):
        for _layer in range(2):
            cp.attention(q[:1], k[:tokens], v[:tokens])
    assert cp._planned_last.cache_info().currsize <= 4
    assert cp._planned_last.cache_info().hits == 20, "the second layer finds the plan of the first"
    assert cp._planned.cache_info().currsize == 0, "plans of training stay"


def short_form(tokens: Tensor) -> tuple[Tensor, Tensor]:
    local = farspan.shard(tokens, group=dist.group.WORLD)  # pyright: ignore
    return local, farspan.unshard(local, group=dist.group.WORLD)  # pyright: ignore


def test_tokens_are_sharded_and_come_back(ranks: Pools) -> None:
    tokens = torch.arange(8)
    found = ranks(2).run(short_form, tokens)
    assert [local.tolist() for local, _ in found] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert all(whole.equal(tokens) for _, whole in found)


def what_auto_says() -> list[str]:
    """On a rank: what is logged of a choice of two shapes, of which one comes with other documents too."""
    cp, (q, k, v), said = farspan.ContextParallel(dist.group.WORLD), inputs(8), []  # pyright: ignore
    with patch.object(api.log, "info", lambda text, *values: said.append(text % values)):
        for documents in ([16], [7, 9]):
            cp.attention(q, k, v, documents=documents)
        cp.attention(q[:4], k[:4], v[:4])
    return said


def test_the_choice_of_auto_is_said_once(ranks: Pools) -> None:
    first, second = ranks(2).run(what_auto_says)
    assert second == []
    for sentence, tokens in zip(first, (8, 4), strict=True):
        pattern = rf"strategy='auto' takes \w+: .* ms .*; then \w+: .*, for Dense\(.*\) over 2 x {tokens} tokens"
        assert re.match(pattern, sentence)


def uneven() -> str:
    with pytest.raises(ValueError, match="cannot share 9 tokens evenly") as raised:
        farspan.shard(torch.arange(9), group=dist.group.WORLD)  # pyright: ignore
    return str(raised.value)


def test_bad_inputs_are_refused(ranks: Pools) -> None:
    q, k, v = inputs(8)
    with pytest.raises(ValueError, match="of the same tokens; got"):
        farspan.attention(q, k[:7], v)
    with pytest.raises(ValueError, match="documents of 7 tokens leave 7 rows"):
        farspan.attention(q, k, v, documents=[3, 4])
    with pytest.raises(ValueError, match="at least one token"):
        farspan.attention(q, k, v, documents=[8, 0])
    with pytest.raises(ValueError, match="equal sums for each of 1 sequences"):
        farspan.attention(q, k, v, documents=[[8], [8]])
    with pytest.raises(ConfigError, match="Did you mean 'moba'"):
        farspan.attention(q, k, v, mechanism="mobba")
    with pytest.raises(ConfigError, match=r"does not take \{'blocks': 4\}"):
        farspan.mechanism("moba", blocks=4)
    with pytest.raises(ConfigError, match="Did you mean 'ring'"):
        farspan.attention(q, k, v, strategy="rnig")
    with pytest.raises(ConfigError, match="Did you mean 'zigzag'"):
        farspan.attention(q, k, v, layout="zigzg")
    with pytest.raises(ValueError, match="passes no gradient"):
        farspan.ContextParallel().unshard(q)
    assert all("documents=[9]" in sentence for sentence in ranks(2).run(uneven))


def test_names_are_imported_when_they_are_asked_for() -> None:
    """None of them imports a stack that another program may have, nor what only a run needs."""
    check = f"""
import sys, farspan
assert "torch" not in sys.modules
for name in ("attention", "load", "testing"):
    getattr(farspan, name)
    print(name, *sorted({STACKS} & sys.modules.keys()))
farspan.nothing
"""
    failed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert failed.stdout.split() == ["attention", "load", "testing"]
    assert failed.stderr.strip().endswith("module 'farspan' has no attribute 'nothing'")

"""Baselines that call flash-attn, replaced by plain torch where it is not installed: they compute our mechanisms."""

from dataclasses import replace

import pytest
import torch

from farspan.errors import ConfigError
from farspan.kernels.cuda import packages as flash_attn
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.spans import Spans
from farspan.kernels.mechanisms.window import Window
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.baselines.flash_packages import MODULES, FlashAttn, packed_lengths
from farspan.tools.bench.baselines.public_moba import Blocks, PublicMoBA, choose
from farspan.tools.bench.case import Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import Check, check_rows, compare_contender
from farspan.tools.bench.contenders import Contender
from farspan.tools.bench_attention import baselines_on
from tests.support import fake_flash_attn
from tests.support.fake_flash_attn import CALLED
from tests.support.flash_attn_signatures import PUBLIC, PUBLISHED, signatures, stand_ins

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(heads=Heads(query=4, kv=2), head_dim=16, value_dim=16, dtype=torch.bfloat16, device=CPU)
ROWS = {"one": Rows.packed([300]), "packed": check_rows(300, packed=True), "short": Rows.packed([20, 32, 33])}
VERSIONS = {"flash_attn_2": "fa2", "flash_attn_3": "fa3_b1", "flash_attn_4": "fa4_b36"}


def check(contender: Contender, mechanism: Mechanism, rows: Rows) -> None:
    with connected(Ranks(), CPU):
        verdict = compare_contender(contender, Check(mechanism, rows, SHAPE))
    assert verdict.correct, verdict.message


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    "mechanism", [Dense(), Dense(causal=False), Window(window=40), Window(window=20, causal=False)], ids=str
)
@pytest.mark.parametrize("name", VERSIONS)
def test_public_functions(name: str, mechanism: Mechanism, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash_attn.install(monkeypatch, VERSIONS[name])
    check(FlashAttn(name), mechanism, rows)
    assert [f"{VERSIONS[name][:3]}_public"] == CALLED


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("version", PUBLISHED)
def test_public_functions_as_published_take_our_arguments(
    version: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"flash-attn": "flash_attn_2", "flash_attn_3": "flash_attn_3", "flash-attn-4": "flash_attn_4"}[
        PUBLISHED[version][0]
    ]
    q, calls = torch.randn(20, 4, 16), []
    module = stand_ins(signatures(version), {PUBLIC: q}, calls)
    monkeypatch.setattr(flash_attn, "module", lambda found: module if found == MODULES[name] else None)
    attend = FlashAttn(name).plan(Window(window=5, causal=causal), Rows.packed([12, 8]), SHAPE)
    assert attend(q, q, q) is q
    ((_, found),) = calls
    starts = [found.pop(word).tolist() for word in ("cu_seqlens_q", "cu_seqlens_k")]
    assert starts == [[0, 12, 20]] * 2
    assert [found.pop(word).shape for word in ("q", "k", "v")] == [q.shape] * 3
    window = (4, 0 if causal else 4)
    assert found == {"max_seqlen_q": 12, "max_seqlen_k": 12, "causal": causal, "window_size": window}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("block", "top_k"), [(32, 3), (32, 1), (40, 20), (128, 2), (512, 3)])
def test_moba_of_the_public_code(block: int, top_k: int, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls forward and two backward; one each where no block but a query's own is chosen."""
    fake_flash_attn.install(monkeypatch, "fa2")
    check(PublicMoBA(), MoBA(block=block, top_k=top_k), rows)
    longest = max(packed_lengths("", rows))
    assert ["fa2"] * (4 if top_k > 1 and longest > block else 2) == CALLED


def test_moba_with_scores_that_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where softmax is nearly a choice of one key, the merge must not overflow, nor the gradients."""
    fake_flash_attn.install(monkeypatch, "fa2")
    mechanism, rows = MoBA(block=32, top_k=3), Rows.packed([200])
    q, k, v = inputs_of(mechanism, 200, SHAPE)
    out = PublicMoBA().plan(mechanism, rows, SHAPE)(q * 100, k, v)
    found = [out, *torch.autograd.grad(out, (q, k, v), gradient_of_out(200, SHAPE))]
    assert all(x.isfinite().all() for x in found)


def test_candidates_of_moba() -> None:
    """Two documents, of 70 and 32 tokens, in blocks of 32: the last block of each is chosen by its own tokens only."""
    blocks = Blocks.cut([70, 32], 32, CPU)
    assert blocks.starts.tolist() == [0, 32, 64, 70, 102]
    assert (blocks.start.tolist(), blocks.end.tolist(), blocks.longest) == ([0, 32], [70, 70], 32)
    q, k = (torch.randn(102, 2, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    one, two = choose(q, k, blocks, 1), choose(q, k, blocks, 2)
    assert one.sum(dim=0).tolist() == [[0] * 32 + [1] * 38 + [0] * 32] * 2
    assert two.sum(dim=0).tolist() == [[0] * 32 + [1] * 32 + [2] * 6 + [0] * 32] * 2


@pytest.mark.parametrize("contender", [PublicMoBA(), *(FlashAttn(name) for name in VERSIONS)], ids=lambda x: x.name)
def test_what_they_do_not_compute_is_refused(contender: Contender) -> None:
    own = MoBA() if isinstance(contender, PublicMoBA) else Dense()
    for mechanism in (MoBA(), Window(window=9, sinks=2), NAtS.examples()[0], Spans.examples()[0]):
        if mechanism != own:
            with pytest.raises(ConfigError, match=contender.name):
                contender.plan(mechanism, Rows.packed([64]), SHAPE)
    with pytest.raises(ConfigError, match="bfloat16 and float16 only"):
        contender.plan(own, Rows.packed([64]), replace(SHAPE, dtype=torch.float32))
    shuffled = Rows.packed([64]).take(torch.arange(64).flip(0))
    with pytest.raises(ConfigError, match="complete documents"):
        contender.plan(own, shuffled, SHAPE)


def test_installed_packages_are_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*versions: str) -> list[str]:
        fake_flash_attn.install(monkeypatch, *versions)
        assert not any("flash_attn" in x.name or "moba" in x.name for x in baselines_on(CPU))
        return [x.name for x in baselines_on(CUDA) if not x.name.startswith("torch_")]

    assert names() == []
    assert names("fa2") == ["flash_attn_2", "public_moba"]
    assert names("fa3_head", "fa4_b36") == ["flash_attn_3", "flash_attn_4"]

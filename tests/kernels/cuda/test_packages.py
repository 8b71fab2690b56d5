"""FlashAttention 2, 3 and 4 where there is no GPU: plain torch behind the signatures of each version."""

import sys
from pathlib import Path

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.cuda import flash as library_flash
from farspan.kernels.cuda import packages as flash_attn
from farspan.kernels.cuda.flash import choose, installed
from farspan.kernels.cuda.operators import Cudnn, Lengths, Library, TorchFlash
from farspan.kernels.cuda.packages import FlashAttn2, FlashAttn3, FlashAttn4, Package
from farspan.kernels.masks.attention_mask import AttentionMask
from tests.kernels.cuda.test_flash import ATTENTION_MASKS, check_formula, check_parts_over_disjoint_keys
from tests.support import fake_flash_attn, oracle
from tests.support.attention_cases import Tensors, expect
from tests.support.fake_flash_attn import CALLED
from tests.support.mechanisms import normal

CPU = torch.device("cpu")
VERSIONS = {"fa2": FlashAttn2, "fa3_b1": FlashAttn3, "fa3_head": FlashAttn3, "fa4_b36": FlashAttn4}


def prepare(monkeypatch: pytest.MonkeyPatch, *versions: str, generation: int = 9, cudnn: int = 0) -> None:
    """Have a GPU of a generation, these versions and no other, and cuDNN of this version."""
    fake_flash_attn.install(monkeypatch, *versions)
    monkeypatch.setattr(library_flash, "generation", lambda device: generation)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    prepare(monkeypatch, request.param)
    return request.param


# Padding, grouped heads and regions are prepared in the same way for all versions, and are tested in test_flash.py.
@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), [((4, 4), 16, 16), ((4, 2), 20, 12)])
@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS[:3], ids=str)
def test_equals_the_formula(
    version: str, attention_mask: AttentionMask, heads: tuple[int, int], head_dim: int, value_dim: int
) -> None:
    check_formula(attention_mask, heads, head_dim, value_dim)
    assert set(CALLED) <= {version.partition("_")[0]}


def test_out_and_lse_may_be_of_more_keys(version: str) -> None:
    """As in a ring; scores are large, so that an lse of another base or scale would show."""
    check_parts_over_disjoint_keys(scale=3)
    assert CALLED


@pytest.mark.parametrize("causal", [True, False])
def test_operators_themselves(version: str, causal: bool) -> None:
    """Forward and backward of two sequences with grouped heads, not contiguous, aligned bottom right."""
    library = VERSIONS[version].find()
    assert isinstance(library, VERSIONS[version])
    # [T, D, H] -> [T, H, D]
    q, k, v, dout = (
        x.transpose(1, 2).contiguous()[..., :16]
        for x in normal((70, 24, 4), (90, 24, 2), (90, 24, 2), (70, 24, 4), dtype=torch.float16)
    )
    queries, keys = torch.tensor([[0, 30, 70], [0, 35, 90]], dtype=torch.int32)
    lengths = Lengths(queries=queries, keys=keys, most_queries=40, most_keys=55)
    out, lse = library.forward(q, k, v, lengths, causal=causal, scale=0.25)
    found = library.backward(dout, q, k, v, out, lse, lengths, causal=causal, scale=0.25)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 70), torch.float32)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, v)]
    mask = torch.zeros(70, 90, dtype=torch.bool)
    mask[:30, :35] = torch.ones(30, 35, dtype=torch.bool).tril(5 if causal else 35)
    mask[30:, 35:] = torch.ones(40, 55, dtype=torch.bool).tril(15 if causal else 55)
    expected = expect(Tensors(q, k, v, dout), mask.expand(4, -1, -1))
    oracle.assert_close([out, lse.t(), *found], expected, 4e-3)


@pytest.mark.parametrize("package", [FlashAttn2, FlashAttn3, FlashAttn4])
def test_nothing_is_found_where_nothing_is_installed(package: type[Package], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    assert package.find() is None
    assert [type(x) for x in installed(CPU)] == [TorchFlash]


@pytest.mark.parametrize(("version", "package"), [("fa2_old", FlashAttn2), ("fa4_early", FlashAttn4)])
def test_versions_of_other_signatures_count_as_absent(
    version: str, package: type[Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch, version)
    assert package.find() is None


@pytest.mark.parametrize(
    "failure",
    ["import no_such_cuda_extension", "raise OSError('undefined symbol')", "raise AttributeError('x')", "x = 1"],
)
def test_a_broken_installation_counts_as_absent(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its CUDA extension, built for another torch, beside another compiler, or something else of that name."""
    prepare(monkeypatch)
    for name in ("flash_attn", "flash_attn.cute", *(package.module for package in VERSIONS.values())):
        monkeypatch.delitem(sys.modules, name, raising=False)
        path = tmp_path.joinpath(*name.split("."))
        if name in ("flash_attn", "flash_attn.cute"):
            path.mkdir()
        else:
            path.with_suffix(".py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    for package in (FlashAttn2, FlashAttn3, FlashAttn4):
        assert package.find() is None
        sys.modules.pop(package.module, None)


def test_a_module_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(flash_attn.importlib, "import_module", asked.append)
    name = "a_module_of_no_other_test"
    assert flash_attn.module(name) is flash_attn.module(name) is None
    assert asked == [name]


ALL = ("fa2", "fa3_head", "fa4_b36")


@pytest.mark.parametrize(
    ("generation", "versions", "cudnn", "width", "expected"),
    [
        (9, ALL, 91501, 128, (None, FlashAttn3)),
        (9, ALL, 91501, 256, (None, FlashAttn3)),
        (9, ("fa2", "fa4_b36"), 91501, 128, (Cudnn, FlashAttn4)),
        (9, ("fa2", "fa4_b36"), 91500, 128, (None, FlashAttn4)),
        (9, ("fa2", "fa4_b36"), 91501, 136, (None, FlashAttn2)),
        (9, (), 91501, 128, (Cudnn, TorchFlash)),
        (9, (), 91501, 136, (None, TorchFlash)),
        (10, ALL, 91501, 128, (None, FlashAttn4)),
        (10, ("fa3_b1",), 91501, 128, (Cudnn, TorchFlash)),
        (10, ALL, 91501, 192, (None, FlashAttn2)),
        (8, ALL, 91501, 128, (None, FlashAttn2)),
        (8, (), 91501, 128, (None, TorchFlash)),
        (12, ("fa3_b1", "fa4_b36"), 91501, 64, (None, TorchFlash)),
    ],
)
def test_choice(
    generation: int,
    versions: tuple[str, ...],
    cudnn: int,
    width: int,
    expected: tuple[type[Cudnn] | None, type[Library]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(monkeypatch, *versions, generation=generation, cudnn=cudnn)
    for_one, for_many = choose(installed(CPU), width)
    assert (None if for_one is None else type(for_one), type(for_many)) == expected


def test_libraries_that_were_found_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, "fa2", "fa3_b1", cudnn=91501)
    assert BACKENDS.get("cuda").calls() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BACKENDS.get("cuda").calls() == "FlashAttention 3, cuDNN, FlashAttention 2, torch's FlashAttention"
    assert BACKENDS.get("reference").calls() == ""

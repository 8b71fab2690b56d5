"""What we pass to flash-attn 2, 3 and 4 is what their functions take, as published and as installed here, if any is.

No kernel runs: the results of these calls are tested in test_packages.py.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.cuda import packages
from farspan.kernels.cuda.operators import Lengths
from farspan.kernels.cuda.packages import Package
from tests.support.flash_attn_signatures import PACKAGES, PUBLISHED, Calls, installed, signatures, stand_ins

PLAIN = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "deterministic": False}
"""Required arguments that say plain softmax attention; others are None."""
ABSENT = {
    "alibi_slopes", "k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "sequed_q", "sequed_k",
    "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale",
    "v_descale",
}  # fmt: skip
"""Required arguments that we pass None for: plain attention has no such thing."""


def check_contract(
    package: type[Package], given: dict[str, inspect.Signature], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call both functions through the adapter; fail on arguments that they do not take, or that we do not know."""
    q, k, v, dout = torch.randn(4, 7, 2, 8).unbind()
    out, lse = torch.randn(7, 2, 8), torch.randn(2, 7)
    gradients = torch.randn(3, 7, 2, 8).unbind()
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    lengths = Lengths(queries=starts, keys=starts.clone(), most_queries=4, most_keys=5)
    forward, backward = package.functions
    calls: Calls = []
    module = stand_ins(given, {forward: (out, lse, None, None), backward: gradients}, calls)
    monkeypatch.setattr(packages, "module", lambda name: module if name == package.module else None)
    library = package.find()
    assert library is not None
    assert library.forward(q, k, v, lengths, causal=True, scale=0.25) == (out, lse)
    library.backward(dout, q, k, v, out, lse, lengths, causal=True, scale=0.25)
    assert [name for name, _ in calls] == [forward, backward]
    common = {"q": q, "k": k, "v": v, "softmax_scale": 0.25, "cu_seqlens_q": starts, "cu_seqlens_k": lengths.keys}
    common |= {"max_seqlen_q": 4, "max_seqlen_k": 5}
    for (name, found), meant in zip(calls, ({}, {"dout": dout, "out": out}), strict=True):
        rest = check_arguments(found, common | meant)
        # Names that differ between packages or versions.
        assert [rest.pop(word) for word in ("causal", "is_causal") if word in rest] == [True]
        assert [rest.pop(word) for word in ("softmax_lse", "lse") if word in rest] == [lse] * ("dout" in meant)
        assert rest.pop("return_lse", True) is True
        written = [rest.pop(word) for word in ("dq", "dk", "dv") if word in rest]
        assert [x.shape for x in written] in ([], [q.shape] * 3)
        check_plain(rest, given[name])


def check_arguments(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Check these arguments, tensors by their identity, and return the others."""
    for name, value in expected.items():
        assert found[name] is value if isinstance(value, Tensor) else found[name] == value, name
    return {name: value for name, value in found.items() if name not in expected}


def check_plain(rest: dict[str, Any], given: inspect.Signature) -> None:
    for name, value in rest.items():
        default = given.parameters[name].default
        if default is not inspect.Parameter.empty:
            assert value == default, name
        elif name in PLAIN:
            assert value == PLAIN[name], name
        else:
            assert name in ABSENT, f"{name} is required, and we do not know what it is"
            assert value is None, name


@pytest.mark.parametrize("version", PUBLISHED)
def test_published_functions_take_our_arguments(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_contract(PACKAGES[PUBLISHED[version][0]], signatures(version), monkeypatch)


@pytest.mark.parametrize("package", PACKAGES)
def test_installed_functions_take_our_arguments(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        given = installed(package)
    except Exception as error:
        # Without its CUDA extension, or built for another torch, a package fails in many ways.
        pytest.skip(f"{package} does not load: {str(error).splitlines()[0]}")
    check_contract(PACKAGES[package], given, monkeypatch)


@pytest.mark.parametrize("version", PUBLISHED)
@pytest.mark.parametrize("name", ["q", "softmax_scale", "causal", "cu_seqlens_k", "max_seqlen_q", "dout", None])
def test_a_changed_function_is_noticed(version: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose parameter has another name or, for None, that has one more to be given."""
    package, given = PACKAGES[PUBLISHED[version][0]], signatures(version)
    more = [inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY)] if name is None else []
    for function in package.functions:
        parameters = given[function].parameters.values()
        names = {name, "is_causal"} if name == "causal" else {name}
        renamed = [x.replace(name=f"{x.name}_") if x.name in names else x for x in parameters]
        if [*renamed, *more] == list(parameters):
            continue
        changed = {**given, function: inspect.Signature([*renamed, *more])}
        with pytest.raises((TypeError, AssertionError, KeyError)):
            check_contract(package, changed, monkeypatch)

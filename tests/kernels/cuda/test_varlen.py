"""Packed documents on a device: how many operations and copies they take, and what is left to cuDNN."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.cuda import flash as cuda_flash
from farspan.kernels.cuda import varlen
from farspan.kernels.cuda.operators import Cudnn, TorchFlash
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.varlen import VarlenSequence
from farspan.parallel.layout import Shards
from tests.support import attention_cases

META = torch.device("meta")
TOKENS, HEADS = 131_072, 32


class Operations(TorchDispatchMode):
    """Operations that a device would run: no views, and no memory that nothing is written into.

    names: of all. copies: how many of them are copies from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and not func.__name__.startswith(("empty", "new_empty")):
            self.names.append(func.__name__)
        from_host = isinstance(args[0], Tensor) and args[0].device.type == "cpu" if args else False
        self.copies += from_host and (kwargs or {}).get("device", args[0].device).type == "meta"
        return func(*args, **(kwargs or {}))


def lengths(mean: int, generator: np.random.Generator) -> list[int]:
    """Documents, log-normal, that fill a sequence; the last one is cut."""
    found: list[int] = []
    while sum(found) < TOKENS:
        found.append(min(1 + int(generator.lognormal(np.log(mean) - 0.5, 1.0)), TOKENS - sum(found)))
    return found


def tensors(queries: int, keys: int) -> list[Tensor]:
    sizes = (queries, HEADS), (keys, HEADS // 4), (keys, HEADS // 4), (queries, HEADS)
    return [torch.empty(*size, 128, dtype=torch.bfloat16, device=META) for size in sizes]


@pytest.mark.parametrize("layout", ["whole", "contiguous", "zigzag", "striped"])
def test_operations_do_not_grow_with_documents(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """125 documents of one rank, or of a rank's queries and another's keys, in the second layer."""
    monkeypatch.setattr(cuda_flash, "generation", lambda device: 8)
    rows = Rows.packed(np.diff(np.linspace(0, TOKENS, 126).astype(int)).tolist())
    queries = keys = rows
    if layout != "whole":
        queries, keys = (rows.take(Shards.build(rows, layout=layout, degree=8).index[rank]) for rank in (3, 2))
    plan = Plan.build(queries, keys, AttentionMask(), heads=HEADS)
    q, k, v, dout = tensors(len(queries), len(keys))
    attention_backward(dout, q, k, v, *attention_forward(q, k, v, plan, backend="cuda"), plan, backend="cuda")
    with Operations() as forward:
        out, lse = attention_forward(q, k, v, plan, backend="cuda")
    with Operations() as backward:
        attention_backward(dout, q, k, v, out, lse, plan, backend="cuda")
    assert forward.names.count("_flash_attention_forward.default") == 1
    assert backward.names.count("_flash_attention_backward.default") == 1
    assert len(forward.names) <= 30, forward.names
    assert len(backward.names) <= 60, backward.names


@pytest.mark.parametrize(
    "attention_mask",
    [
        AttentionMask(),
        AttentionMask(window=40, sinks=2),
        AttentionMask(window=(40, 90) * 16),
        attention_cases.GRID,
    ],
    ids=str,
)
def test_tables_are_copied_once_for_a_sequence(attention_mask: AttentionMask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_flash, "generation", lambda device: 8)
    rows = Rows.packed([10, 130, 1, 60], padding=3)
    plan, (q, k, v, dout) = Plan.build(rows, rows, attention_mask, heads=HEADS), tensors(len(rows), len(rows))
    for layer in range(2):
        with Operations() as found:
            out, lse = attention_forward(q, k, v, plan, backend="cuda")
            attention_backward(dout, q, k, v, out, lse, plan, backend="cuda")
        assert bool(found.copies) == (layer == 0)


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "installed", lambda device: [Cudnn(), TorchFlash()])
    monkeypatch.setattr(varlen, "SHAPES", varlen.ShapeCounter())


def cudnn_shapes(queries: Rows, keys: Rows) -> Iterator[tuple[int, int, bool]]:
    """Queries, keys and whether it is causal of the calls of cuDNN in a plan of a new sequence."""
    plan = Plan.build(queries, keys, AttentionMask(), heads=HEADS)
    q, k, _, _ = tensors(len(queries), len(keys))
    for call in varlen.calls_of(plan, InputSpec.of(q, k)) or ():
        if isinstance(call.library, Cudnn):
            assert isinstance(call.queries, slice)
            assert isinstance(call.keys, slice)
            yield call.queries.stop - call.queries.start, call.keys.stop - call.keys.start, call.causal


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("degree", [1, 8])
def test_new_shapes_of_cudnn_per_sequence_of_125_documents(degree: int) -> None:
    """At most two in any sequence, in a ring of 8 by its worst rank."""
    generator, known = np.random.default_rng(0), set()
    for _ in range(8):
        rows = Rows.packed(lengths(1_000, generator))
        shards = Shards.build(rows, layout="zigzag", degree=degree)
        parts = [rows.take(index) for index in shards.index]
        new = set(chain.from_iterable(cudnn_shapes(parts[-1], keys) for keys in parts)) - known
        assert len(new) <= 2
        known |= new


DRAWN: dict[str, Callable[[np.random.Generator], Any]] = {
    "short": lambda draw: 1 + draw.lognormal(np.log(250), 1.0, 2_000),
    "heavy tails": lambda draw: 1 + draw.lognormal(np.log(1_000) - 2, 2.0, 2_000),
    "heavier tails": lambda draw: 1 + 200 * draw.pareto(1.2, 2_000),
    "exponential": lambda draw: 1 + draw.exponential(1_000, 2_000),
    "equal": lambda _: np.full(200, 1_049),
    "one long": lambda draw: np.append(draw.integers(30_000, 100_000), 1 + draw.exponential(700, 2_000)),
}


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("drawn", DRAWN)
def test_new_shapes_of_cudnn_whatever_lengths_documents_have(drawn: str) -> None:
    generator, known = np.random.default_rng(0), set()
    for _ in range(4):
        ends = np.minimum(DRAWN[drawn](generator).astype(int).cumsum(), TOKENS)
        rows = Rows.packed(np.diff(ends, prepend=0)[np.diff(ends, prepend=0) > 0].tolist())
        assert len(rows) == TOKENS
        new = set(cudnn_shapes(rows, rows)) - known
        assert len(new) <= 2
        known |= new


def sequence_of(tokens: int) -> VarlenSequence:
    return VarlenSequence(0, tokens, 0, tokens, causal=True)


class Kind:
    """Of tensors; lets other threads go on wherever it is looked up."""

    def __hash__(self) -> int:
        time.sleep(1e-6)
        return 1


def test_shapes_are_counted_by_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that plans ahead and the main thread: no sequence is lost."""
    sequence, kind, threads, turns = sequence_of(1_000), Kind(), 4, 100
    counter = varlen.ShapeCounter(worth=(threads * turns - 1) * sequence.pairs)
    monkeypatch.setattr(varlen, "MOST_REPEATS", threads * turns)
    with ThreadPoolExecutor(threads) as pool:
        counted = [pool.submit(counter.is_worth, sequence, kind) for _ in range(threads * turns)]
        assert [one.result() for one in counted].count(True) == 2


def test_counted_and_planned_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "MOST_COUNTED", 3)
    monkeypatch.setattr(varlen, "MOST_PLANNED", 2)
    counter = varlen.ShapeCounter(worth=2 * sequence_of(1_000).pairs)
    # 1,000 tokens are forgotten while three others are met, and count from 0.
    met = [1_000, 901, 902, 903, 1_000, 903, 903, 1_000, 902, 902, 902, 903, 1_000]
    worth = [tokens for tokens in met if counter.is_worth(sequence_of(tokens))]
    assert worth == [903, 1_000, 903, 1_000]


def spec_of(width: int, dtype: torch.dtype) -> InputSpec:
    return InputSpec(device=META, dtype=dtype, kv_heads=8, head_dim=width, value_dim=width)


@pytest.mark.usefixtures("with_cudnn")
def test_shapes_are_counted_by_mask_heads_head_size_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be a plan of its own: of one that was met once, none is made."""
    rows = Rows.packed([1_000])
    monkeypatch.setattr(varlen.SHAPES, "worth", 2 * 500_500)
    kinds = [(32, spec_of(64, torch.bfloat16)), (8, spec_of(64, torch.bfloat16))]
    kinds += [(32, spec_of(128, torch.bfloat16)), (32, spec_of(64, torch.float16))]
    for turn in range(2):
        for heads, spec in kinds:
            calls = varlen.calls_of(Plan.build(rows, rows, AttentionMask(), heads=heads), spec)
            assert calls is not None
            assert [isinstance(call.library, Cudnn) for call in calls] == [turn == 1]
    masks = (VarlenSequence(0, 1_000, 0, 1_000, causal=causal) for causal in (False, True))
    assert [varlen.SHAPES.is_worth(sequence, "another kind") for sequence in masks] == [False, False]


@pytest.mark.usefixtures("with_cudnn")
def test_one_plan_serves_heads_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes those of up to 128."""
    monkeypatch.setattr(varlen.SHAPES, "worth", 1)
    rows = Rows.packed([1_000])
    plan = Plan.build(rows, rows, AttentionMask(), heads=HEADS)
    calls = [varlen.calls_of(plan, spec_of(width, torch.bfloat16)) or [] for width in (128, 256)]
    assert [type(call.library) for of in calls for call in of] == [Cudnn, TorchFlash]


@pytest.mark.usefixtures("with_cudnn")
def test_long_and_repeated_shapes_are_left_to_cudnn() -> None:
    """One document is long; chunks of a ring of 8 repeat, and are few shapes; short documents share a call."""
    one = Rows.packed([TOKENS])
    assert list(cudnn_shapes(one, one)) == [(TOKENS, TOKENS, True)]
    short = Rows.packed([8_192, 100])
    assert [len(list(cudnn_shapes(short, short))) for _ in range(9)] == [0] * 7 + [1] * 2
    parts = [one.take(index) for index in Shards.build(one, layout="zigzag", degree=8).index]
    found = [set(chain.from_iterable(cudnn_shapes(parts[3], keys) for keys in parts)) for _ in range(4)]
    assert found[-1] == {(16_384, 16_384, True), (16_384, 8_192, False), (8_192, 16_384, False)}
    tiny = Rows.packed([64] * 2_000)
    assert not any(list(cudnn_shapes(tiny, tiny)) for _ in range(3))

"""Chunked linear cross-entropy against torch's in float64, its precision in 16 bits, and its memory."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from farspan.kernels.layers import cross_entropy, fused
from farspan.kernels.layers.cross_entropy import CHUNK_BYTES, check_labels, chunk_tokens, linear_cross_entropy
from tests.support.mechanisms import normal

TOKENS, VOCABULARY, WIDTH = 37, 53, 11
MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def bytes_for(tokens: int, dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY) -> int:
    """chunk_bytes that make chunks of this many tokens."""
    return tokens * vocabulary * max(dtype.itemsize, 4)


def inputs(
    dtype: torch.dtype = torch.float64, tokens: int = TOKENS, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels and the gradient that arrives for each token, of either sign."""
    hidden, weight, upstream = normal((tokens, WIDTH), (vocabulary, WIDTH), (tokens,))
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, upstream


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    return functional.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=ignored)


def with_gradients(losses: Tensor, leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [losses, *torch.autograd.grad(losses, leaves, upstream)]


def assert_same(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, chunk_bytes: int) -> None:
    """Losses and both gradients equal torch's to 1e-12."""
    results = (linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes), reference(hidden, weight, labels))
    ours, theirs = (with_gradients(losses, (hidden, weight), upstream) for losses in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 16, TOKENS, 10 * TOKENS], ids="chunk{}".format)
def test_equals_torch_in_float64(chunk: int) -> None:
    """37 tokens make an uneven last chunk for 5 and for 16."""
    assert_same(*inputs(), chunk_bytes=bytes_for(chunk))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_ignored_tokens_cost_and_give_nothing(chunk: int) -> None:
    hidden, weight, labels, upstream = inputs()
    labels[::3] = -100
    labels[8:24] = -100  # complete chunks without a label
    assert_same(hidden, weight, labels, upstream, bytes_for(chunk))
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    losses = linear_cross_entropy(poisoned.requires_grad_(), weight, labels, chunk_bytes=bytes_for(chunk))
    torch.testing.assert_close(losses, reference(hidden, weight, labels), rtol=1e-12, atol=1e-12)
    for gradient in torch.autograd.grad(losses, (poisoned, weight), upstream):
        assert gradient.isfinite().all()


def test_another_ignored_label() -> None:
    hidden, weight, labels, _ = inputs()
    labels[3:9] = 0
    losses = linear_cross_entropy(hidden, weight, labels, ignored=0)
    torch.testing.assert_close(losses, reference(hidden, weight, labels, ignored=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_labels_at_all(tokens: int) -> None:
    hidden, weight, labels, upstream = inputs(tokens=tokens)
    losses = linear_cross_entropy(hidden, weight, labels.fill_(-100))
    assert torch.equal(losses, torch.zeros(tokens, dtype=torch.float64))
    grad_hidden, grad_weight = torch.autograd.grad(losses, (hidden, weight), upstream)
    assert torch.equal(grad_hidden, torch.zeros_like(hidden))
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_a_gpu_takes_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them have labels only the device knows: no token may be selected, and results are the same."""
    monkeypatch.setattr(fused, "on_gpu", lambda _: True)
    monkeypatch.setattr(Tensor, "nonzero", lambda _: pytest.fail("the host waits"))
    for chunk in (1, 5, TOKENS):
        test_equals_torch_in_float64(chunk)
    test_ignored_tokens_cost_and_give_nothing(4)
    test_another_ignored_label()
    for tokens in (0, 4):
        test_no_labels_at_all(tokens)
    assert cross_entropy._exp_in_place(torch.tensor([-200.0])).item() == 0.0


def test_non_contiguous_hidden() -> None:
    _, weight, labels, upstream = inputs()
    (wide,) = normal((WIDTH, 2 * TOKENS), seed=5)
    hidden = wide.requires_grad_().T[::2]
    assert not hidden.is_contiguous()
    assert_same(hidden, weight, labels, upstream, bytes_for(5))


@pytest.mark.parametrize("wanted", [0, 1], ids=["hidden", "weight"])
def test_only_one_input_wants_a_gradient(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, upstream = inputs()
    expected = torch.autograd.grad(reference(hidden, weight, labels), (hidden, weight), upstream)[wanted]
    both = [hidden, weight]
    both[1 - wanted] = both[1 - wanted].detach()
    losses = linear_cross_entropy(both[0], both[1], labels, chunk_bytes=bytes_for(5))
    skipped = ("_add_weight_gradient", "_hidden_gradient")[wanted]
    monkeypatch.setattr(cross_entropy, skipped, lambda *_: pytest.fail("an unwanted gradient was computed"))
    torch.testing.assert_close(torch.autograd.grad(losses, both[wanted], upstream)[0], expected, rtol=1e-12, atol=1e-12)


def test_evaluation_saves_nothing() -> None:
    hidden, weight, labels, _ = inputs()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, labels)
    assert losses.grad_fn is None
    torch.testing.assert_close(losses, reference(hidden, weight, labels), rtol=1e-12, atol=1e-12)


def test_training_saves_the_inputs_and_one_number_a_token() -> None:
    hidden, weight, labels, _ = inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    inputs_saved = {hidden.data_ptr(), weight.data_ptr()}
    assert {tuple(t.shape) for t in saved if t.data_ptr() not in inputs_saved} == {(TOKENS,)}


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, labels, upstream = inputs()
    hidden = (1e4 * hidden).detach().requires_grad_()
    assert_same(hidden, weight, labels, upstream, bytes_for(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_probabilities_are_never_subnormal(dtype: torch.dtype) -> None:
    """Matrix products of subnormal numbers are tens of times slower on x86."""
    x = torch.tensor([0.0, -1.0, -50.0, -100.0, -740.0, -1e30, -torch.inf, torch.nan], dtype=dtype)
    out = cross_entropy._exp_in_place(x.clone())
    assert (out[:-1] >= torch.finfo(dtype).tiny).all()
    assert out[-1].isnan()
    torch.testing.assert_close(out[:-1], x[:-1].exp(), rtol=1e-6, atol=1e-34)


def test_lost_hidden_states_show_in_the_loss() -> None:
    hidden, weight, labels, _ = inputs()
    hidden = hidden.detach().clone()
    hidden[5, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels).isnan().nonzero().tolist() == [[5]]


def plain_path(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The code one writes without this module: 16-bit logits, float32 statistics."""
    return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def errors_16_bit(loss: Loss, dtype: torch.dtype) -> list[float]:
    """Largest errors of the losses and relative errors of both gradients, against float64 on the same 16-bit inputs."""
    hidden, weight, labels, upstream = inputs(dtype, tokens=200, vocabulary=300)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    losses, *gradients = with_gradients(loss(hidden, weight, labels), (hidden, weight), upstream.float())
    exact, *true = with_gradients(reference(wide[0], wide[1], labels), wide, upstream)
    assert losses.dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype, dtype]
    errors = [((g.double() - t).norm() / t.norm()).item() for g, t in zip(gradients, true, strict=True)]
    return [(losses - exact).abs().max().item(), *errors]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, chunk_bytes=bytes_for(16, torch.float32, 300))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_lose_only_the_rounding_of_the_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_TILE_BYTES", 7 * WIDTH * 4)  # 7 rows of the vocabulary
    loss_error, *gradient_errors = errors_16_bit(chunked, dtype)
    assert loss_error <= 5e-6  # the plain path: about 5e-2 in bfloat16
    assert max(gradient_errors) <= torch.finfo(dtype).eps / 2
    for ours, plain in zip((loss_error, *gradient_errors), errors_16_bit(plain_path, dtype), strict=True):
        assert ours <= 2 * plain


def test_widening_products_are_called_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA branch with its two products emulated: they take 16-bit factors and give float32."""
    mm, addmm = torch.mm, torch.addmm

    def widening_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert out_dtype == torch.float32
        product = mm(a.float(), b.float())
        return product if out is None else out.copy_(product)

    def widening_addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert total is out
        assert out.dtype == out_dtype == torch.float32
        return out.copy_(addmm(total, a.float(), b.float()))

    monkeypatch.setattr(cross_entropy, "_widens", lambda x: x.dtype == torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", widening_mm)
        patched.setattr(torch, "addmm", widening_addmm)
        emulated = errors_16_bit(chunked, torch.bfloat16)
    assert emulated[0] <= 5e-6
    for ours, plain in zip(emulated, errors_16_bit(plain_path, torch.bfloat16), strict=True):
        assert ours <= 1.1 * plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_in_bfloat16() -> None:
    hidden, weight, labels, upstream = inputs(torch.bfloat16, tokens=200, vocabulary=304)
    expected, *true = with_gradients(chunked(hidden, weight, labels), (hidden, weight), upstream.float())
    on_gpu = [t.detach().cuda().requires_grad_() for t in (hidden, weight)]
    losses, *ours = with_gradients(chunked(on_gpu[0], on_gpu[1], labels.cuda()), on_gpu, upstream.float().cuda())
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(ours, true, strict=True):
        assert (got.cpu().double() - want.double()).norm() <= 2**-8 * want.double().norm()


@pytest.mark.parametrize(("label", "ignored"), [(VOCABULARY, -100), (-1, -100), (-100, -1)])
def test_label_outside_the_vocabulary_is_refused(label: int, ignored: int) -> None:
    hidden, weight, labels, _ = inputs()
    labels[7] = label
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of {VOCABULARY}"):
        linear_cross_entropy(hidden, weight, labels, ignored=ignored)


def test_no_label_is_none_outside_the_vocabulary() -> None:
    check_labels(torch.tensor([-100, -100]), 3)
    check_labels(torch.tensor([], dtype=torch.int64), 3)
    check_labels(torch.tensor([2, 0, -100]), 3)


def test_mismatched_inputs_are_refused() -> None:
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match=r"must be \[tokens, width\]"):
        linear_cross_entropy(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match="one label to each of 37 tokens"):
        linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(ValueError, match="cast one of them"):
        linear_cross_entropy(hidden, weight.float(), labels)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, labels, _ = inputs()
    losses = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)


def test_chunk_size() -> None:
    assert chunk_tokens(131_072, torch.float32) == chunk_tokens(131_072, torch.bfloat16) == 256
    assert chunk_tokens(131_072, torch.float64) == 128
    assert chunk_tokens(128_256, torch.bfloat16) == 256  # 261 would fit
    assert chunk_tokens(1000, torch.float32, 12_000) == 3
    assert chunk_tokens(1000, torch.float32, 1) == 1
    assert chunk_tokens(128_256, torch.bfloat16, CHUNK_BYTES["cuda"]) == 2080  # 2,093 would fit


def test_logits_are_never_held_whole() -> None:
    """Measured in a process of its own: 8 MiB chunks of what would be 512 MiB of logits."""
    command = "-m farspan.tools.measure_loss_memory --tokens 4096 --vocabulary 32768 --width 16 --threads 1"
    run = subprocess.run(
        [sys.executable, *command.split(), "--chunk-bytes", str(8 * MIB)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(run.stdout)
    assert measured["full_logits_bytes"] == 512 * MIB
    assert measured["chunk_tokens"] == 64
    # One chunk of logits at least, or the measurement saw nothing; Linux counts resident pages to some hundred KiB.
    assert 7 * MIB <= measured["peak_extra_bytes"] <= 24 * MIB, measured

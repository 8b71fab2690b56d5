"""The convolution on keys against a plain loop over documents, in float64; gradients by autograd through the loop."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.layers import key_convolution
from farspan.kernels.layers.key_convolution import Taps, convolve, convolve_backward, earlier_rows
from farspan.kernels.masks.rows import Rows
from tests.support.mechanisms import normal

HEADS, HEAD_DIM = 2, 4
NOTHING = Rows.packed([])
DOCUMENTS = {"one": Rows.packed([23]), "packed": Rows.packed([1, 9, 2, 3, 7], padding=3), "nothing": NOTHING}


def loop(k: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """The formula, key by key; padding gives 0."""
    places = {
        (document, position): place
        for place, (document, position) in enumerate(zip(rows.document.tolist(), rows.position.tolist(), strict=True))
        if document >= 0
    }
    convolved = []
    for place, (document, position) in enumerate(zip(rows.document.tolist(), rows.position.tolist(), strict=True)):
        total = weight[0] * k[place]
        for lag in range(1, len(weight)):
            if position >= lag and (document, position - lag) in places:
                total = total + weight[lag] * k[places[document, position - lag]]
        convolved.append(k[place] + total / (1 + torch.exp(-total)) if document >= 0 else torch.zeros_like(k[place]))
    return torch.stack(convolved) if convolved else k * weight[0]


def draw(*lengths: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return normal(*((length, HEADS, HEAD_DIM) for length in lengths), dtype=dtype)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("documents", list(DOCUMENTS))
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("chunk_rows", [4, 1000])
def test_equals_a_loop(
    documents: str, width: int, shuffled: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(key_convolution.CHUNK_ELEMENTS, "cpu", chunk_rows * HEADS * HEAD_DIM)
    rows = DOCUMENTS[documents]
    if shuffled:
        rows = rows.take(torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)))
    k, weight, dout = draw(len(rows), width, len(rows))
    expected = loop(k.requires_grad_(), weight.requires_grad_(), rows)
    wanted = torch.autograd.grad(expected, (k, weight), dout)
    taps, halo = Taps.build(rows, NOTHING, width), k.new_empty(0, HEADS, HEAD_DIM)
    torch.testing.assert_close(convolve(k, halo, weight, taps), expected, rtol=1e-12, atol=1e-12)
    dk, dhalo, dweight = convolve_backward(dout, k, halo, weight, taps)
    assert dhalo.shape == halo.shape
    torch.testing.assert_close((dk, dweight), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_padding_reaches_nothing(bad: float) -> None:
    """Neither its keys nor the gradients of its outputs, not even the gradient of the weight."""
    rows = DOCUMENTS["packed"]
    k, weight, dout = draw(len(rows), 3, len(rows))
    taps, halo, padding = Taps.build(rows, NOTHING, 3), k.new_empty(0, HEADS, HEAD_DIM), rows.document < 0
    expected = [convolve(k, halo, weight, taps), *convolve_backward(dout, k, halo, weight, taps)]
    k[padding] = dout[padding] = bad
    found = [convolve(k, halo, weight, taps), *convolve_backward(dout, k, halo, weight, taps)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[0][padding].any()
    assert not found[1][padding].any()


@pytest.mark.parametrize("width", [3, 5])
def test_a_halo_is_rows_like_others(width: int) -> None:
    """Half of the rows are on other ranks; their gradient is that of the loop."""
    rows = Rows.packed([1, 9, 2, 3, 7])
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    local, halo = index[:11], index[11:]
    k, weight, dout = draw(len(rows), width, len(local))
    expected = loop(k.requires_grad_(), weight.requires_grad_(), rows)[local]
    dk, dweight = torch.autograd.grad(expected, (k, weight), dout)
    taps = Taps.build(rows.take(local), rows.take(halo), width)
    torch.testing.assert_close(convolve(k[local], k[halo], weight, taps), expected, rtol=1e-12, atol=1e-12)
    got = convolve_backward(dout, k[local], k[halo], weight, taps)
    torch.testing.assert_close(got, (dk[local], dk[halo], dweight), rtol=1e-12, atol=1e-12)


def test_documents_are_independent() -> None:
    k, weight, taps = torch.zeros(7, 1, 1), torch.ones(3, 1, 1), Taps.build(Rows.packed([4, 3]), NOTHING, 3)
    for token, changed in ((3, [3]), (4, [3, 4, 5, 6])):
        k[token] = 1.0
        assert convolve(k, k[:0], weight, taps).flatten().nonzero().flatten().tolist() == changed


def test_a_weight_of_zero_leaves_keys_as_they_are_and_learns() -> None:
    rows = Rows.packed([6])
    (k, dout), taps = draw(6, 6), Taps.build(rows, NOTHING, 3)
    weight = torch.zeros(3, HEADS, HEAD_DIM, dtype=torch.float64)
    assert torch.equal(convolve(k, k[:0], weight, taps), k)
    _, _, dweight = convolve_backward(dout, k, k[:0], weight, taps)
    assert (dweight != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    rows = Rows.packed([40, 24])
    (k, weight, dout), taps = draw(64, 5, 64, dtype=dtype), Taps.build(rows, NOTHING, 5)
    out = convolve(k, k[:0], weight, taps)
    gradients = convolve_backward(dout, k, k[:0], weight, taps)
    assert out.dtype == dtype
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    exact = convolve(k.double(), k[:0].double(), weight.double(), taps)
    exact_gradients = convolve_backward(dout.double(), k.double(), k[:0].double(), weight.double(), taps)
    assert (out == exact.to(dtype)).double().mean() > 0.99
    torch.testing.assert_close(gradients, exact_gradients, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_missing_rows() -> None:
    """A fragment that begins at a later position; padding reads and is read by nothing, wherever it claims to be."""
    position, document = torch.tensor([5, 6, 8, 1, 0], dtype=torch.int32), torch.tensor([0, 0, 0, -1, -1]).int()
    rows = Rows(position=position, document=document)
    assert earlier_rows(rows, rows, 2).tolist() == [[-1, 0, -1, -1, -1], [-1, -1, 1, -1, -1]]
    assert earlier_rows(rows, NOTHING, 1).tolist() == [[-1] * 5]


def test_wrong_shapes_are_refused() -> None:
    rows = Rows.packed([6])
    taps, k = Taps.build(rows, rows.slice(slice(0)), 3), torch.zeros(6, 2, 4)
    with pytest.raises(ValueError, match=r"for a weight of 3, 6 keys and 0 of a halo; got 5, 6 and 0"):
        convolve(k, k[:0], torch.zeros(5, 2, 4), taps)
    with pytest.raises(ValueError, match=r"got 3, 6 and 1"):
        convolve_backward(k, k, k[:1], torch.zeros(3, 2, 4), taps)
    with pytest.raises(ValueError, match=r"same heads and features"):
        convolve(k, k[:0], torch.zeros(3, 2, 5), taps)

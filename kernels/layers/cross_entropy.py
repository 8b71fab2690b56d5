"""Linear projection and cross-entropy together, one token chunk of logits at a time, in both directions.

Legend: T tokens, N tokens with a label, n tokens of one chunk, V vocabulary, C width.

For a token with hidden h, label y and logits z = W h the loss is lse(z) - z_y. The forward pass keeps lse(z) alone;
the backward pass recomputes the chunk's logits and turns them in place into p = exp(z - lse(z)), with 1 taken from
p_y. With u the gradient of the token's loss, dh = u Wᵀp and dW = Σ u p hᵀ; the weighting by u is done on h and
dh, which are narrow, and not on the logits. The idea is that of Wijmans et al., arXiv:2411.09009, at the level of
matrix products.

Exactness: logits and all that follows from them are float32 (float64 for float64 inputs). For bfloat16 and float16
inputs the products of 16-bit numbers are accumulated and stored in float32, so a logit is never rounded to 16 bits. On
CUDA p (and u h) is rounded to the input dtype to be multiplied, as in any 16-bit backward pass; elsewhere it is not.
Gradients of the weight are summed over chunks in float32, and all gradients rounded once.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.layers import fused

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Logits that exist at once. Every chunk adds to the float32 gradient of the weight: on a GPU that passes through its
memory, 4 GB for a vocabulary of 128,256 and a width of 4,096, which 2,048 tokens are worth and 256 are not. It does not
depend on a GPU's memory, so that sums have the same bits on all of them."""
_TILE_BYTES = 16 * 2**20  # bounds the float32 copy of a part of a 16-bit weight, where the device cannot widen
_CHUNK_MULTIPLE_TOKENS = 16


def chunk_tokens(vocabulary: int, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES["cpu"]) -> int:
    """The number of tokens whose logits exist at once: as many as fit `chunk_bytes`, but at least one.

    Logits are float32, or float64 for float64 inputs. From 16 tokens on the count is a multiple of 16, which matrix
    units like.
    """
    fitting = chunk_bytes // (_logit_dtype(dtype).itemsize * max(vocabulary, 1))
    if fitting >= _CHUNK_MULTIPLE_TOKENS:
        fitting -= fitting % _CHUNK_MULTIPLE_TOKENS
    return max(fitting, 1)


def _logit_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widens(x: Tensor) -> bool:
    """Whether the device multiplies such matrices into a float32 result: CUDA, 16 bits, by `out_dtype`."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _weight_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of `weight` in `dtype`: all at once if no copy is needed, else tile by tile in one scratch."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    tile_rows = max(1, _TILE_BYTES // (dtype.itemsize * max(weight.shape[1], 1)))
    scratch = weight.new_empty(min(tile_rows, weight.shape[0]), weight.shape[1], dtype=dtype)
    for rows in _chunks(weight.shape[0], tile_rows):
        yield rows, scratch[: rows.stop - rows.start].copy_(weight[rows])


def _write_logits(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Set logits [n, V] to hidden [n, C] · weight [V, C]ᵀ."""
    if _widens(hidden):
        torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits)
        return
    hidden = hidden.to(logits.dtype)
    for rows, tile in _weight_tiles(weight, logits.dtype):
        torch.mm(hidden, tile.T, out=logits[:, rows])


def _hidden_gradient(slope: Tensor, weight: Tensor) -> Tensor:
    """Return slope [n, V] · weight [V, C], at least float32."""
    if _widens(slope):
        return torch.mm(slope, weight, out_dtype=torch.float32)
    total = slope.new_zeros(slope.shape[0], weight.shape[1])
    for rows, tile in _weight_tiles(weight, slope.dtype):
        total.addmm_(slope[:, rows], tile)
    return total


def _add_weight_gradient(total: Tensor, slope: Tensor, weighted: Tensor) -> None:
    """Add slope [n, V]ᵀ · weighted [n, C] to total [V, C]; `weighted` and `total` are at least float32."""
    if _widens(slope):
        torch.addmm(total, slope.T, weighted.to(slope.dtype), out_dtype=total.dtype, out=total)
    else:
        total.addmm_(slope.T, weighted)


def _exp_in_place(x: Tensor) -> Tensor:
    """Set x to exp(x), but to no less than a thousand times the smallest normal number.

    Subnormal probabilities make exp and the products that follow 10 to 60 times slower on x86 (measured); raising them
    to 1e-35 changes no sum of at least 1. NaN stays NaN. A GPU has subnormals for nothing, and no pass to spare.
    """
    if fused.on_gpu(x):
        return x.exp_()
    return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny) + 7).exp_()


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses of the labeled tokens `rows`, zero for the others; one logits buffer serves every chunk of a pass.

    rows: None where every token has a label.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor | None, target: Tensor, tokens_per_chunk: int
    ) -> Tensor:
        dtype = _logit_dtype(hidden.dtype)
        losses = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        lse = hidden.new_empty(len(target), dtype=dtype)
        buffer = weight.new_empty(min(len(target), tokens_per_chunk), len(weight), dtype=dtype)
        for chunk in _chunks(len(target), tokens_per_chunk):
            tokens, label = chunk if rows is None else rows[chunk], target[chunk, None]  # [n], [n, 1]
            logits = buffer[: len(label)]
            _write_logits(hidden[tokens], weight, logits)
            top = logits.amax(dim=1, keepdim=True)  # [n, 1]
            at_label = logits.gather(1, label) - top
            log_sum = _exp_in_place(logits.sub_(top)).sum(dim=1, keepdim=True).log_()
            losses[tokens] = (log_sum - at_label)[:, 0]
            lse[chunk] = (log_sum + top)[:, 0]
        ctx.save_for_backward(hidden, weight, rows, target, lse)
        ctx.tokens_per_chunk = tokens_per_chunk
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; torch's once_differentiable would drop the graph silently
            raise RuntimeError("linear_cross_entropy can be differentiated once only, not with create_graph=True")
        (grad_losses,) = grad_outputs
        hidden, weight, rows, target, lse = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_zeros(hidden.shape) if wants_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=lse.dtype) if wants_weight else None
        buffer = weight.new_empty(min(len(target), ctx.tokens_per_chunk), len(weight), dtype=lse.dtype)
        for chunk in _chunks(len(target), ctx.tokens_per_chunk):
            tokens, label = chunk if rows is None else rows[chunk], target[chunk, None]  # [n], [n, 1]
            part, upstream = hidden[tokens], grad_losses[tokens, None]  # [n, C], [n, 1]
            logits = buffer[: len(label)]
            _write_logits(part, weight, logits)
            softmax = _exp_in_place(logits.sub_(lse[chunk, None]))
            slope = softmax.scatter_(1, label, softmax.gather(1, label) - 1)  # ∂loss/∂logits [n, V]
            if _widens(part):
                slope = slope.to(part.dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] = (_hidden_gradient(slope, weight) * upstream).to(hidden.dtype)
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, slope, part.to(lse.dtype) * upstream)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignored: int = -100, chunk_bytes: int | None = None
) -> Tensor:
    """-log softmax(weight · hidden_t)[label_t] of every token t: float32 [T], float64 for float64 inputs.

    hidden [T, C] and weight [V, C] share a dtype and are differentiable, once. labels are int64 [T]; where a label is
    `ignored` the loss is 0, whatever the hidden state, even NaN, and no work is done but on a GPU, which the host would
    have to wait for to learn which these are. Memory beyond the gradients: one chunk of logits within `chunk_bytes`
    (see `chunk_tokens`; by default CHUNK_BYTES of the device; on CUDA a 16-bit backward pass adds a 16-bit copy of it),
    and for a 16-bit weight its float32 gradient until that is rounded. Raises ValueError for other shapes or dtypes
    and, but on a GPU (see `check_labels`), for labels outside the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [tokens, width] and "
            "[vocabulary, width]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must give one label to each of {hidden.shape[0]} tokens")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them")
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES["cuda" if fused.on_gpu(labels) else "cpu"]
    tokens_per_chunk = chunk_tokens(weight.shape[0], hidden.dtype, chunk_bytes)
    if fused.on_gpu(labels):
        # Tokens without a label are computed as zeros with label 0; their losses and gradients are masked.
        unlabeled = labels == ignored
        hidden, target = hidden.masked_fill(unlabeled[:, None], 0.0), labels.masked_fill(unlabeled, 0)
        losses = _LinearCrossEntropy.apply(hidden, weight, None, target, tokens_per_chunk)
        return losses.masked_fill(unlabeled, 0.0)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    check_labels(labels, weight.shape[0], ignored=ignored)
    rows = (labels != ignored).nonzero()[:, 0]  # [N]
    return _LinearCrossEntropy.apply(hidden, weight, rows, labels[rows], tokens_per_chunk)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """weight · hidden_t of every token t, not differentiable: float32 [T, V], float64 for float64 inputs.

    hidden [T, C] and weight [V, C] share a dtype. Memory beyond the result: a tile of the weight at most.
    """
    logits = hidden.new_empty(len(hidden), len(weight), dtype=_logit_dtype(hidden.dtype))
    _write_logits(hidden, weight, logits)
    return logits


def check_labels(labels: Tensor, vocabulary: int, *, ignored: int = -100) -> None:
    """Raise ValueError for a label, int64 [T] on the CPU, that is neither in the vocabulary nor `ignored`."""
    # A label of 0 is in any vocabulary.
    lowest, highest = (int(label) for label in labels.where(labels != ignored, 0).aminmax()) if len(labels) else (0, 0)
    if lowest < 0 or highest >= max(vocabulary, 1):
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"label {wrong} is outside the vocabulary of {vocabulary} (0 to {vocabulary - 1}); "
            f"tokens without a label carry {ignored}"
        )

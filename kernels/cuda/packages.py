"""FlashAttention 2, 3 and 4 of the packages flash-attn, flash_attn_3 and flash-attn-4, where they are installed.

Written from the sources of flash-attn 2.8.3.post2, of FlashAttention 3 (3.0.0.b1 and the head of its repository) and of
flash-attn-4 (4.0.0b3, b13, b36): tensors of packed sequences are `[T, H, D]`, the lse is natural and float32, `[H, T]`,
and causal is aligned bottom right. Only functions below the public ones take an external out and lse; their signatures
change, so all arguments go by keyword. `deterministic` is left at the packages' default, the fast one: gradients of
queries are summed by atomics, in any order (the Triton backend's are not).
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Self, final

from torch import Tensor

from farspan.kernels.cuda.operators import Gradients, Lengths, Library

PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
"""Arguments of FlashAttention 2 that say plain softmax attention."""


@cache
def module(name: str) -> ModuleType | None:
    """Return a module, or None where it is not installed or does not load."""
    # Without its CUDA extension, or built for another torch, a package fails in many ways.
    try:
        return importlib.import_module(name)
    except Exception:
        return None


@cache
def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Return the names of a function's parameters and whether each has to be given."""
    # A custom operator of torch has the signature (*args, **kwargs), and its function in `_init_fn`.
    signature = inspect.signature(getattr(function, "_init_fn", function))
    return {name: parameter.default is parameter.empty for name, parameter in signature.parameters.items()}


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function by keyword, with None for all other required parameters."""
    missing = {name for name, needed in parameters(function).items() if needed} - arguments.keys()
    return function(**arguments, **dict.fromkeys(missing))


class Package(Library):
    """A library of a package.

    marks: parameters of the forward and of the backward function that only the versions which this class can call have.
    options, backward_options: arguments of the two functions besides tensors, lengths, scale and causal.
    """

    module: ClassVar[str]
    functions: ClassVar[tuple[str, str]]
    marks: ClassVar[tuple[str, str]]
    options: ClassVar[dict[str, Any]] = {}
    backward_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self._forward, self._backward = forward, backward

    @classmethod
    def find(cls) -> Self | None:
        found = module(cls.module)
        functions = [getattr(found, name, None) for name in cls.functions]
        forward, backward = functions
        if forward is None or backward is None:
            return None
        able = all(mark in parameters(function) for mark, function in zip(cls.marks, (forward, backward), strict=True))
        return cls(forward, backward) if able else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        arguments = _lengths(self._forward, lengths) | self.options
        out, lse, *_ = call(self._forward, q=q, k=k, v=v, softmax_scale=scale, causal=causal, **arguments)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, *,
        causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        arguments: dict[str, Any] = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_scale": scale}
        names = parameters(self._backward)
        arguments |= {"is_causal" if "is_causal" in names else "causal": causal, **self.backward_options}
        arguments |= _lengths(self._backward, lengths)
        if "softmax_lse" in names:
            # Versions 2 and 3 write their results into tensors that they are given.
            dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
            call(self._backward, softmax_lse=lse, dq=dq, dk=dk, dv=dv, **arguments)
        else:
            dq, dk, dv, *_ = call(self._backward, lse=lse, **arguments)
        return dq, dk, dv


def _lengths(function: Callable[..., Any], lengths: Lengths) -> dict[str, Any]:
    """Return the lengths as arguments of a function; the first versions of 4 have no `max_seqlen_`."""
    found = {
        "cu_seqlens_q": lengths.queries,
        "cu_seqlens_k": lengths.keys,
        "max_seqlen_q": lengths.most_queries,
        "max_seqlen_k": lengths.most_keys,
    }
    return {name: value for name, value in found.items() if name in parameters(function)}


@final
class FlashAttn2(Package):
    """FlashAttention 2, from 2.7 on."""

    name = "FlashAttention 2"
    widest = 256
    module = "flash_attn.flash_attn_interface"
    functions = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    marks = ("window_size_left", "window_size_left")
    options: ClassVar[dict[str, Any]] = PLAIN
    backward_options: ClassVar[dict[str, Any]] = {"deterministic": False, **PLAIN}


@final
class FlashAttn3(Package):
    """FlashAttention 3, for Hopper, from 3.0.0.b1 on, which requires arguments that are optional later."""

    name = "FlashAttention 3"
    widest = 256
    module = "flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    marks = ("attention_chunk", "cu_seqlens_q")


@final
class FlashAttn4(Package):
    """FlashAttention 4, for Hopper and Blackwell; versions differ above head size 128, and in what else they return.

    The first one, inside flash-attn 2.8, does not return its lse: it counts as absent.
    """

    name = "FlashAttention 4"
    widest = 128
    module = "flash_attn.cute.interface"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    marks = ("return_lse", "cu_seqlens_q")
    options: ClassVar[dict[str, Any]] = {"return_lse": True}

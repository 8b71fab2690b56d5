"""FlashAttention 2, 3 and 4 of the packages flash-attn, flash_attn_3 and flash-attn-4, where they are installed.

Written from the sources of flash-attn 2.8.3.post2, of FlashAttention 3 (3.0.0.b1 and the head of its repository) and of
flash-attn-4 (4.0.0b3, b13, b36): tensors are `[N, T, H, D]`, the lse is natural and float32, `[N, H, T]` (`[H, T]` for
packed sequences), and causal is aligned bottom right. Only functions below the public ones take an external out and
lse; their signatures change, so all arguments go by keyword. `deterministic` is left at the packages' default, the fast
one: gradients of queries are summed by atomics, in any order (the Triton backend's are not).
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Self, final

from torch import Tensor

from farspan.kernels.cuda.operators import Gradients, Library

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
    """A library of a package: the layout of its base class outside, the package's own layout inside.

    mark: a parameter of the forward function that only the versions which this class can call have. options,
    backward_options: arguments of the two functions besides tensors, scale and causal.
    """

    module: ClassVar[str]
    functions: ClassVar[tuple[str, str]]
    mark: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    backward_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self._forward, self._backward = forward, backward

    @classmethod
    def find(cls) -> Self | None:
        found = module(cls.module)
        forward, backward = (getattr(found, name, None) for name in cls.functions)
        if forward is None or backward is None or cls.mark not in parameters(forward):
            return None
        return cls(forward, backward)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = _swap(q, k, v)
        out, lse, *_ = call(self._forward, q=q, k=k, v=v, softmax_scale=scale, causal=causal, **self.options)
        # [N, T, H, D] -> [N, H, T, D]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        dout, q, k, v, out = _swap(dout, q, k, v, out)
        arguments: dict[str, Any] = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_scale": scale}
        names = parameters(self._backward)
        arguments |= {"is_causal" if "is_causal" in names else "causal": causal, **self.backward_options}
        if "softmax_lse" in names:
            # Versions 2 and 3 write their results into tensors that they are given.
            dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
            call(self._backward, softmax_lse=lse, dq=dq, dk=dk, dv=dv, **arguments)
        else:
            dq, dk, dv, *_ = call(self._backward, lse=lse, **arguments)
        dq, dk, dv = _swap(dq, dk, dv)
        return dq, dk, dv


@final
class FlashAttn2(Package):
    """FlashAttention 2, from 2.7 on."""

    name = "FlashAttention 2"
    widest = 256
    module = "flash_attn.flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    mark = "window_size_left"
    options: ClassVar[dict[str, Any]] = {"return_softmax": False, **PLAIN}
    backward_options: ClassVar[dict[str, Any]] = {"deterministic": False, **PLAIN}


@final
class FlashAttn3(Package):
    """FlashAttention 3, for Hopper, from 3.0.0.b1 on, which requires arguments that are optional later."""

    name = "FlashAttention 3"
    widest = 256
    module = "flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")
    mark = "attention_chunk"


@final
class FlashAttn4(Package):
    """FlashAttention 4, for Hopper and Blackwell; versions differ above head size 128, and in what else they return.

    The first one, inside flash-attn 2.8, does not return its lse: it counts as absent.
    """

    name = "FlashAttention 4"
    widest = 128
    module = "flash_attn.cute.interface"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    mark = "return_lse"
    options: ClassVar[dict[str, Any]] = {"return_lse": True}


def _swap(*tensors: Tensor) -> list[Tensor]:
    # [N, H, T, D] -> [N, T, H, D], or back
    return [x.transpose(1, 2) for x in tensors]

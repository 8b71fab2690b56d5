# pyright: reportMissingImports=false, reportInvalidTypeForm=false
"""bfloat16 for Triton's interpreter.

The interpreter stores bfloat16 as 16-bit integers and computes with these: products, sums and comparisons are silently
wrong, and casts truncate. The patch widens operands to float32 and rounds results to the nearest even, as a GPU does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def patch() -> None:
    """Patch the interpreter of this process; it also gets faster."""
    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        if hasattr(builder, name):
            setattr(builder, name, _in_float32(getattr(builder, name)))
    call = interpreter.InterpretedFunction.__call__
    patched: set[str] = set()
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self: Any, a: Handle, b: Handle, acc: Handle, *rest: Any) -> Handle:
        return dot(self, _widened(a), _widened(b), acc, *rest)

    def cast_impl(self: Any, source: Handle, dtype: Any) -> Handle:
        if dtype.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else Handle(_rounded(source.data), tl.bfloat16)
        return cast(self, _widened(source), dtype)

    def create_fp_to_fp(self: Any, source: Handle, dtype: Any, rounding: Any) -> Handle:
        if _is_bfloat16(source) or dtype.scalar == tl.bfloat16:
            return cast_impl(self, source, dtype)
        return convert(self, source, dtype, rounding)

    def called(self: Any, *arguments: Any, **options: Any) -> Any:
        # The interpreter patches the language again for each function that a kernel calls. Functions of a kernel find
        # it patched already, and those of the language itself after their first call: nobody takes that patch back.
        # Without the repetition kernels run in half the time.
        module = self.fn.__module__
        if module.startswith("farspan.") or module in patched:
            return self.rewrite()(*arguments, **options)
        patched.add(module)
        return call(self, *arguments, **options)

    interpreter.InterpretedFunction.__call__ = called
    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _widened(value: Any) -> Any:
    if not _is_bfloat16(value):
        return value
    return Handle((np.ascontiguousarray(value.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    even = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return np.where(np.isnan(values), 0x7FC0, even >> 16).astype(np.uint16)


def _in_float32(operation: Callable[..., Handle]) -> Callable[..., Handle]:
    def widened(self: Any, *values: Any, **options: Any) -> Handle:
        if not any(_is_bfloat16(value) for value in values):
            return operation(self, *values, **options)
        found = operation(self, *(_widened(value) for value in values), **options)
        if found.data.dtype == np.float32:
            return Handle(_rounded(found.data), tl.bfloat16)
        return Handle(found.data, tl.int1) if found.data.dtype == np.bool_ else found

    return widened

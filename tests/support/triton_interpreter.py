# pyright: reportMissingImports=false, reportInvalidTypeForm=false
"""Triton's interpreter as the tests want it: bfloat16 as on a GPU, and several times as fast.

The interpreter stores bfloat16 as 16-bit integers and computes with these: products, sums and comparisons are silently
wrong, and casts truncate. The patch widens operands to float32 and rounds results to the nearest even, as a GPU does.

For a tile of a test NumPy takes microseconds, and the interpreter's bookkeeping of types a hundred times as long. The
patch makes each type once, and leaves out work whose result the interpreter drops. `patch` is for the pinned version.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


@cache
def patch() -> None:
    """Patch the interpreter of this process."""
    _compute_in_bfloat16()
    _patch_the_language_once()
    _make_types_once()


def _compute_in_bfloat16() -> None:
    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        if hasattr(builder, name):
            setattr(builder, name, _in_float32(getattr(builder, name)))
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

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp


def _is_bfloat16(value: Any) -> bool:
    return type(value) is Handle and value.data.dtype == np.uint16 and value.dtype.scalar == tl.bfloat16


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
        if not any(map(_is_bfloat16, values)):
            return operation(self, *values, **options)
        found = operation(self, *(_widened(value) for value in values), **options)
        if found.data.dtype == np.float32:
            return Handle(_rounded(found.data), tl.bfloat16)
        return Handle(found.data, tl.int1) if found.data.dtype == np.bool_ else found

    return widened


def _patch_the_language_once() -> None:
    """The interpreter patches `triton.language` for each launch and for each function that a kernel calls."""
    patch_lang, done = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        # What a launch takes back: nothing, as all of this process is interpreted.
        if function.__module__ not in done:
            done.add(function.__module__)
            patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
    # Integer sums and products are checked for overflow by kernels that are made for debugging; these are not, and the
    # interpreter drops what it has found.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _make_types_once() -> None:
    core = tl.core
    made: dict[Any, dict[str, Any]] = {}
    make_block, make_tensor, equals = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    broadcast, np_dtype, np_dtypes = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(n.value if type(n) is core.constexpr else n for n in shape))
        if key not in made:
            make_block(self, element_ty, shape)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        # A type's shape in the form that tensors have it.
        if (of_type := type.__dict__.get("of_tensors")) is None:
            make_tensor(self, handle, type)
            type.of_tensors = {"numel": self.numel, "shape": self.shape, "dtype": self.dtype, "type": type}
        else:
            self.__dict__.update(of_type)
            self.handle = handle

    def same_dtype(self: Any, other: Any) -> bool:
        return self is other or equals(self, other)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def get_np_dtype(dtype: Any) -> np.dtype:
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = block_type, tensor, same_dtype
    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast_impl_value, get_np_dtype

"""Triton's interpreter, made right for what the templates use.

As it comes (3.6, 3.7) it keeps bfloat16 as bit patterns in uint16: products, sums and comparisons
work on the bits, conversions from float32 cut instead of rounding, and constants fail. The
functions of `libdevice` return None, a fused multiply-add rounds twice, and assertions are left
out, though Inductor compiles with them. `install` replaces these, in this process; the environment
must have TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_PLAIN = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "fmod": np.fmod,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "nearbyint": np.rint,
    "pow": np.power,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}
_TESTS = {"isinf": np.isinf, "isnan": np.isnan, "signbit": np.signbit}


def install() -> None:
    """Replaces what is wrong; once."""
    if getattr(InterpreterBuilder, "bfloat16_is_right", False):
        return
    InterpreterBuilder.bfloat16_is_right = True
    for name, function in _PLAIN.items():
        setattr(libdevice, name, _on_blocks(function))
    for name, function in _TESTS.items():
        setattr(libdevice, name, _on_blocks(function, tl.int1))
    _install_bfloat16()
    InterpreterBuilder.create_fma = _fused_multiply_add
    InterpreterBuilder.create_assert = _assert
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False
    )


def _assert(self: Any, condition: Any, message: str) -> None:
    assert np.all(condition.data), message


def _fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Of float32: the product of two is exact in float64."""
    with np.errstate(all="ignore"):
        wide = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _on_blocks(function: Any, result: Any = None) -> Any:
    def call(*arguments: Any) -> Any:
        semantic = interpreter.interpreter_semantic
        blocks = [a if isinstance(a, tl.core.tensor) else semantic.to_tensor(a) for a in arguments]
        if len(blocks) == 2:
            blocks = list(semantic.broadcast_impl_value(*blocks))
        with np.errstate(all="ignore"):
            values = np.asarray(function(*[block.handle.data for block in blocks]))
        dtype = result or blocks[0].dtype.scalar
        values = values.astype(interpreter._get_np_dtype(dtype))
        block_type = tl.block_type(dtype, list(values.shape)) if values.shape else dtype
        return tl.core.tensor(TensorHandle(values, dtype), block_type)

    return call


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(bits: Any) -> Any:
    """float32 of bfloat16 bits."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> Any:
    """bfloat16 bits of float32, to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _wide(handle: Any) -> Any:
    return TensorHandle(_widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _install_bfloat16() -> None:
    builder = InterpreterBuilder
    dot, cast, between = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    binary, unary = builder.binary_op, builder.unary_op

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _wide(a), _wide(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        scalar = target.scalar
        if _is_bfloat16(source):
            if scalar == tl.bfloat16:
                return source
            return _wide(source) if scalar == tl.float32 else cast(self, _wide(source), target)
        if scalar == tl.bfloat16:
            return TensorHandle(_rounded(np.asarray(source.data, dtype=np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return between(self, source, target, *rest)

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if not (_is_bfloat16(a) and _is_bfloat16(b)):
            return binary(self, a, b, operation)
        found = operation(_widened(a.data), _widened(b.data))
        if found.dtype == bool:
            return TensorHandle(found, tl.int1)
        return TensorHandle(_rounded(found), tl.bfloat16)

    def unary_op(self: Any, a: Any, operation: Any) -> Any:
        if not _is_bfloat16(a):
            return unary(self, a, operation)
        return TensorHandle(_rounded(operation(_widened(a.data))), tl.bfloat16)

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(_rounded(np.array([value], np.float32)), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp, builder.get_bf16 = create_fp_to_fp, get_bf16
    builder.binary_op, builder.unary_op = binary_op, unary_op

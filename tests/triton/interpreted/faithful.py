"""Corrections of Triton's interpreter, so that it computes what a GPU does.

It multiplies and adds apart where a GPU has one fma that rounds once: 5 % of the normals would differ.
It adds down a column one by one where a GPU adds in a tree.
It rounds a float argument to fp32, whatever its type; it truncates fp32 to bf16, and multiplies matrices of
bf16 as if their bits were integers.
And it goes through the whole language at every call of a device function, for half of the time.
"""

import types

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vaeops.ref import vq


def _fma(_, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if x.data.dtype == np.float64:
        if all(np.array_equal(h.data, h.data.astype(np.float32)) for h in (x, y)):  # the product is exact
            return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
        a, b, c = (torch.from_numpy(np.ascontiguousarray(h.data)) for h in (x, y, z))
        return TensorHandle(vq.fma(a, b, c).numpy(), z.dtype.scalar)
    product = x.data.astype(np.float64) * y.data.astype(np.float64)  # exact
    addend = z.data.astype(np.float64)
    total = np.asarray(product + addend)
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)  # TwoSum: total + error is the exact sum
    bits = total.view(np.int64)
    odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1)  # rounding to odd makes the last cast safe
    bits = np.where(np.isfinite(error) & (error != 0) & (bits & 1 == 0), odd, bits)
    return TensorHandle(bits.view(np.float64).astype(np.float32), z.dtype.scalar)


def _sum(self: interpreter.ReduceOps, x: tl.tensor) -> tl.tensor:
    data = np.moveaxis(x.handle.data, self.axis, -1)
    while data.shape[-1] > 1:  # a power of two
        data = data[..., ::2] + data[..., 1::2]
    data = np.moveaxis(data, -1, self.axis) if self.keep_dims else data[..., 0]
    return self.to_tensor(data, x.dtype)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_) -> TensorHandle:
    a_data, b_data = (
        cast(self, h, tl.float32).data if h.dtype.scalar == tl.bfloat16 else h.data for h in (a, b)
    )
    return TensorHandle(np.matmul(a_data, b_data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


cast = InterpreterBuilder.cast_impl


def _cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
    return cast(self, src, dst_type)


def _call(self: interpreter.InterpretedFunction, *args, **kwargs):
    languages = (m for m in self.fn.__globals__.values() if isinstance(m, types.ModuleType))
    if any(tl.core.is_builtin(m.load) for m in languages if m is tl or m is tl.core):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    interpreter.InterpretedFunction.__call__ = _call
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    interpreter.ReduceOps.sum = _sum
    convert = interpreter._implicit_cvt

    def keep_fp64(argument):
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument]), tl.float64), tl.float64)
        return convert(argument)

    interpreter._implicit_cvt = keep_fp64

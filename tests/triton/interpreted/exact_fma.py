"""An fma that rounds once for Triton's interpreter, which multiplies and adds apart: 5 % of the normals would differ."""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _fma(_, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if x.data.dtype != np.float32:
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    product = x.data.astype(np.float64) * y.data.astype(np.float64)  # exact
    addend = z.data.astype(np.float64)
    total = np.asarray(product + addend)
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)  # TwoSum: total + error is the exact sum
    bits = total.view(np.int64)
    odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1)  # rounding to odd makes the last cast safe
    bits = np.where((error != 0) & (bits & 1 == 0), odd, bits)
    return TensorHandle(bits.view(np.float64).astype(np.float32), z.dtype.scalar)


def install() -> None:
    InterpreterBuilder.create_fma = _fma

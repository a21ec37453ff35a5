"""What the kernels of the family share: rows through any strides, powers of two, one exact score.

A tensor [*R, D] comes as its pointer and a tuple `at`: (step, stride) where its row dims merge into one, else
(step, stride, size, stride, ...), outermost first. Element (n, d) lies at row_offset(n, at) + d * step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _layout as layout

# Kernel arguments that change from batch to batch: Triton must not compile anew for their values.
FIXED = ("rows", "first", "per_program", "programs")


def rows_at(t: Tensor | None) -> tuple[int, ...] | None:
    if t is None:
        return None
    dims = layout._merge(tuple(t.shape[:-1]), [t.stride()[:-1]])
    if not dims:  # one row, with the stride of several: nothing compiles anew for it
        dims = [(1, [t.stride(-2) if t.dim() > 1 else t.shape[-1]])]
    inner = (number for size, (stride,) in dims[1:] for number in (size, stride))
    return (t.stride(-1), dims[0][1][0], *inner)


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any of the tensors is, else fp32."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def row_offset(row, at):
    """int64 offset of rows (int64), their number taken apart along the merged dims."""
    total = row * 0
    for d in tl.static_range(len(at) // 2 - 1, 0, -1):
        total += (row % at[2 * d]) * at[2 * d + 1]
        row = row // at[2 * d]
    return total + row * at[1]


@triton.jit
def is_finite(v):
    return tl.abs(v) < float("inf")


@triton.jit
def exponent(v):
    """The least n with v < 2^n, for normal v > 0; for 0 and smaller ones that of the least normal number."""
    if v.dtype == tl.float64:
        n = (v.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022
    else:
        n = (v.to(tl.int32, bitcast=True) >> 23) - 126
    return n


@triton.jit
def power_of_two(n, F: tl.constexpr):
    """2^n in F, exact: n is that of a normal number."""
    if F.is_fp64():
        value = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        value = ((n + 127) << 23).to(tl.float32, bitcast=True)
    return value

"""Square roots and quotients that round once in fp32, as the other implementations' do, and in fp64."""

import torch
import triton
import triton.language as tl

TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def root(v):
    return tl.sqrt(v) if v.dtype == tl.float64 else tl.sqrt_rn(v)


@triton.jit
def divide(a, b):
    """a / b: the fp32 operator is not that exact."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)

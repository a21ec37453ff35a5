"""Codes by their indices, and its transpose: sums of rows by index. Specification: vaeops/ref/vq.py."""

import torch
from torch import Tensor
from torch.autograd import Function

from ...ref import vq as ref
from .._autograd import check_traced, forward_mode
from .._library import check_impl, define, overloads
from . import check
from .assign import triton_kernel


def _fake_gather(indices, codebook, x, fill, reduction):
    if x is None:
        return codebook.new_empty((*indices.shape, codebook.shape[1])), None
    loss = None
    if reduction != ref.NO_LOSS:
        shape = indices.shape if reduction == 0 else ()
        loss = x.new_empty(shape, dtype=ref.compute_dtype(x, codebook))
    return torch.empty_like(x), loss


def _fake_segment_sum(values, indices, weights, absmax, K, skip_nonfinite, fp64):
    dtype = torch.int64 if absmax is not None else torch.float64 if fp64 else torch.float32
    return values.new_empty(K, dtype=dtype), values.new_empty((K, values.shape[-1]), dtype=dtype)


define("vq_gather",
       "(Tensor indices, Tensor codebook, Tensor? x, float fill, int reduction) -> (Tensor, Tensor)",
       fake=_fake_gather, ref=ref.vq_gather, triton=triton_kernel("vq_gather"))  # fmt: skip
define("vq_segment_sum",
       "(Tensor values, Tensor indices, Tensor? weights, Tensor? absmax, int K, bool skip_nonfinite,"
       " bool fp64) -> (Tensor, Tensor)",
       fake=_fake_segment_sum, ref=ref.vq_segment_sum, triton=triton_kernel("vq_segment_sum"))  # fmt: skip
GATHER, SEGMENT_SUM = overloads("vq_gather"), overloads("vq_segment_sum")


class _Lookup(Function):
    @staticmethod
    def forward(codebook, indices, fill, impl):
        return GATHER[impl](indices, codebook, None, fill, ref.NO_LOSS)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        codebook, indices, _, ctx.impl = inputs
        ctx.save_for_backward(indices)
        ctx.codes, ctx.dtype = codebook.shape[0], codebook.dtype

    @staticmethod
    def backward(ctx, g):
        (indices,) = ctx.saved_tensors
        gradient = _scatter(g, indices, ctx.codes, ctx.impl)
        return gradient.to(ctx.dtype), None, None, None


class _LookupForward(_Lookup):
    """With a forward derivative, the lookup of the tangent. torch.compile takes no Function with a jvp."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Lookup.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _lookup(tangent, ctx.saved_tensors[0], 0.0, ctx.impl)


class _Scatter(Function):
    """Transpose of `_Lookup`, for the backward of its backward."""

    @staticmethod
    def forward(values, indices, codes, impl):
        fp64 = values.dtype is torch.float64
        return SEGMENT_SUM[impl](values, indices, None, None, codes, False, fp64)[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, _, ctx.impl = inputs
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype

    @staticmethod
    def backward(ctx, g):
        (indices,) = ctx.saved_tensors
        return _lookup(g, indices, 0.0, ctx.impl).to(ctx.dtype), None, None, None


class _ScatterForward(_Scatter):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _Scatter.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])
        ctx.codes = inputs[2]

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _scatter(tangent, ctx.saved_tensors[0], ctx.codes, ctx.impl)


def _lookup(codebook: Tensor, indices: Tensor, fill: float, impl: str | None) -> Tensor:
    check_traced("vq_lookup")
    if forward_mode():
        return _LookupForward.apply(codebook, indices, fill, impl)
    if torch.is_grad_enabled() and codebook.requires_grad:
        return _Lookup.apply(codebook, indices, fill, impl)
    return _Lookup.forward(codebook.detach(), indices, fill, impl)


def _scatter(values: Tensor, indices: Tensor, codes: int, impl: str | None) -> Tensor:
    if forward_mode():
        return _ScatterForward.apply(values, indices, codes, impl)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _Scatter.forward(values, indices, codes, impl)
    return _Scatter.apply(values, indices, codes, impl)


def vq_lookup(indices: Tensor, codebook: Tensor, *, channel_dim: int = -1, fill: float = 0.0,
              impl: str | None = None) -> Tensor:  # fmt: skip
    """The codes of the indices: what a decoder starts from.

        quantized_n = e[index_n], or `fill` in every element where index_n = -1

    Args:
        indices: [*R], int64 or int32, each in [-1, K).
        codebook: [K, D], any floating dtype, any strides.
        channel_dim: where the D channels stand in the result, which has one dim more than indices.
        fill: float, of rows with index -1.
        impl: None for the device's best, or "ref" | "cpp" | "triton" | "cuda" to force one.

    Returns:
        quantized [*R, D] in the codebook's dtype, contiguous, or a view of that with the channels moved to
        `channel_dim`. Gradient, of any order, forward and reverse: to the codebook, the sum of the rows of
        each code, added in fp64 in row order, hence the same bits from run to run and for any number of
        threads. Saved for backward: indices.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
        RuntimeError: on CPU, an index out of range.
    """
    op = "vq_lookup"
    check.codebook(op, codebook)
    check.indices(op, indices, codebook.device)
    dim = check.channel_dim(op, channel_dim, indices.dim() + 1)
    if not isinstance(fill, (int, float)) or isinstance(fill, bool):
        raise TypeError(f"{op}: fill must be a float, got {type(fill).__name__}")
    check_impl(op, impl, codebook)
    quantized = _lookup(codebook, indices, float(fill), impl)
    return quantized if dim == indices.dim() else quantized.movedim(-1, dim)

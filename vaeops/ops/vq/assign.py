"""The nearest code of each row, and the k nearest. Specification: vaeops/ref/vq.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...ref import vq as ref
from .._library import check_impl, define, overloads
from . import check


def triton_kernel(name: str) -> Callable:
    def launch(*args):
        from ...kernels import vq

        return getattr(vq, name)(*args)

    return launch


def _index_dtype(int32: bool) -> torch.dtype:
    return torch.int32 if int32 else torch.int64


def _fake_assign(x, codebook, mask, metric, exact, int32):
    return x.new_empty(x.shape[:-1], dtype=_index_dtype(int32))


def _fake_topk(x, codebook, mask, k, metric, exact, int32):
    shape = (*x.shape[:-1], k)
    return (
        x.new_empty(shape, dtype=ref.compute_dtype(x, codebook)),
        x.new_empty(shape, dtype=_index_dtype(int32)),
    )


# Triton's search runs on tensor cores, the CUDA C++ one does not.
define("vq_assign", "(Tensor x, Tensor codebook, Tensor? mask, int metric, bool exact, bool int32) -> Tensor",
       fake=_fake_assign, ref=ref.vq_assign, triton=triton_kernel("vq_assign"),
       triton_first=True)  # fmt: skip
define("vq_topk",
       "(Tensor x, Tensor codebook, Tensor? mask, int k, int metric, bool exact, bool int32)"
       " -> (Tensor, Tensor)",
       fake=_fake_topk, ref=ref.vq_topk, triton=triton_kernel("vq_topk"), triton_first=True)  # fmt: skip
ASSIGN, _TOPK = overloads("vq_assign"), overloads("vq_topk")


def vq_assign(x: Tensor, codebook: Tensor, *, metric: str = "l2", precision: str = "exact",
              mask: Tensor | None = None, channel_dim: int = -1, index_dtype: torch.dtype = torch.int64,
              impl: str | None = None) -> Tensor:  # fmt: skip
    """The index of each row's nearest code.

        l2      argmin_k |e_k|^2 / 2 - x.e_k  = argmin_k |x - e_k|
        cosine  argmax_k x.e_k / |e_k|
        dot     argmax_k x.e_k
    Exact: scored in fp64 by the definition in vaeops/ref/vq.py, the lowest index on equality.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`, say [B, D, H, W] and 1; any floating dtype, any
            strides, no copy is made.
        codebook: [K, D], K >= 1, any floating dtype. A code with a NaN or Inf element is never chosen; nor,
            for "cosine", is a zero code.
        metric: "l2" | "cosine" | "dot".
        precision: "exact"; or "fast", which may err where two codes are nearly as near, for speed.
        mask: bool [*R], True = use.
        channel_dim: int, negative counts from the end.
        index_dtype: torch.int64 | torch.int32.
        impl: None for the device's best, or "ref" | "cpp" | "triton" | "cuda" to force one.

    Returns:
        indices [*R]; -1 where masked, 0 for a row with a NaN or Inf element and where no code can be chosen.
        No gradient. With "exact" the same on every implementation, and independent of the batch, the tiling,
        the threads and the strides. No array of N x K elements is made.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.
    """
    op = "vq_assign"
    x = check.rows(op, x, codebook, channel_dim)
    check.mask(op, mask, x)
    code, exact = check.one_of(op, "metric", metric, ref.METRICS), check.exact(op, precision)
    int32 = check.int32(op, index_dtype)
    check_impl(op, impl, x)
    return ASSIGN[impl](x.detach(), codebook.detach(), mask, code, exact, int32)


def vq_topk(x: Tensor, codebook: Tensor, k: int, *, metric: str = "l2", precision: str = "exact",
            mask: Tensor | None = None, channel_dim: int = -1, index_dtype: torch.dtype = torch.int64,
            impl: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k nearest codes of each row, nearest first.

    Args:
        k: int in [1, K].
        Others as in `vq_assign`.

    Returns:
        (scores, indices), both [*R, k], ascending by (score, index). scores: what `vq_assign` minimises
        (|e|^2 / 2 - x.e for "l2", hence |x - e|^2 = 2 score + |x|^2; -x.e / |e|; -x.e), in fp32 (fp64 where
        x or codebook is). Codes that are never chosen come last with score +inf; a masked row holds index -1
        and score +inf. No gradient.

    Raises:
        TypeError, ValueError: as `vq_assign`; k out of range.
    """
    op = "vq_topk"
    x = check.rows(op, x, codebook, channel_dim)
    check.count(op, "k", k, codebook.shape[0])
    check.mask(op, mask, x)
    code, exact = check.one_of(op, "metric", metric, ref.METRICS), check.exact(op, precision)
    int32 = check.int32(op, index_dtype)
    check_impl(op, impl, x)
    return _TOPK[impl](x.detach(), codebook.detach(), mask, k, code, exact, int32)

"""Residual quantization: each level quantizes what the levels before it left over."""

import torch
from torch import Tensor

from ...ref import vq as ref
from ...ref.vq import VQOutput
from .._autograd import forward_mode
from . import check
from .quantize import vector_quantize


def residual_vq(x: Tensor, codebooks: Tensor, *, metric: str = "l2", estimator: str = "ste",
                mask: Tensor | None = None, channel_dim: int = -1, stats: bool = False,
                reduction: str = "mean", precision: str = "exact", deterministic: str | None = None,
                impl: str | None = None) -> VQOutput:  # fmt: skip
    """Quantize x by a sum of Q codes, one of each codebook.

        r_1 = x,   q_i = nearest code of r_i in codebook i,   r_{i+1} = r_i - q_i,   quantized = sum_i q_i
    r and the sum are kept in fp32 (fp64 where x or the codebooks are), so bf16 residuals lose nothing.

    Args:
        x: [*R, D], or with the D channels at `channel_dim`; any floating dtype, any strides.
        codebooks: [Q, K, D], any floating dtype. A slice of it is the same with fewer levels.
        estimator: as in `vector_quantize`, applied once, between x and the sum: "ste" gives dx = g.
        Others as in `vector_quantize`; stats are those of each level's r.

    Returns:
        VQOutput(quantized in x's shape and dtype, indices [*R, Q], commit_loss and codebook_loss [Q] or
        [*R, Q], counts [Q, K], sums [Q, K, D]). commit_loss of level i: between r_i and q_i, with gradient
        to x (the codes of the levels before are constants); codebook_loss: with gradient to codebook i.
        Double backward, of the losses, raises.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is taken; the same under torch.compile.

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021, algorithm 1.
    """
    op = "residual_vq"
    rows = check.rows(op, x, codebooks, channel_dim, codebook_ndim=3)
    check.mask(op, mask, rows)
    check.one_of(op, "estimator", estimator, ref.ESTIMATORS)
    dtype = ref.compute_dtype(x, codebooks)
    residual = rows.to(dtype)
    total = torch.zeros_like(residual)
    levels = []
    for codebook in codebooks.unbind(0):
        level = vector_quantize(residual, codebook, metric=metric, estimator="none", mask=mask, stats=stats,
                                reduction=reduction, precision=precision, deterministic=deterministic,
                                impl=impl)  # fmt: skip
        residual = residual - level.quantized
        total = total + level.quantized
        levels.append(level)
    quantized = with_gradient(total, rows, estimator, mask)
    return VQOutput(
        quantized.movedim(-1, channel_dim),
        torch.stack([level.indices for level in levels], -1),
        torch.stack([level.commit_loss for level in levels], -1),
        torch.stack([level.codebook_loss for level in levels], -1),
        torch.stack([level.counts for level in levels if level.counts is not None]) if stats else None,
        torch.stack([level.sums for level in levels if level.sums is not None]) if stats else None,
    )


def with_gradient(total: Tensor, rows: Tensor, estimator: str, mask: Tensor | None) -> Tensor:
    """The sum of codes, total [*R, D], in the rows' dtype and with a gradient to them by `estimator`."""
    quantized = total.to(rows.dtype)
    differentiated = forward_mode() or (torch.is_grad_enabled() and rows.requires_grad)
    if estimator == "none" or not differentiated:
        return quantized
    through = rows
    if estimator == "rotation":
        through = ref.rotated(rows.to(total.dtype), total).to(rows.dtype)
    if mask is not None:
        through = through.masked_fill(~mask.unsqueeze(-1), 0)
    return quantized + (through - through.detach())  # adds exactly 0

"""The KL of two `torch.distributions.Normal` through the fused op."""

import functools

import torch
from torch import Tensor
from torch.distributions import Normal

from ..ops.gaussian import gaussian_kl


def kl_normal(
    p: Normal, q: Normal, *, reduction: str = "none", batch_ndim: int = 1, impl: str | None = None
) -> Tensor:
    """KL(p || q) in nats; `torch.distributions.kl_divergence(p, q)` with the reduction in the same pass.

        ((mu_p - mu_q) / s_q)^2 / 2 + (s_p / s_q)^2 / 2 - 1 / 2 - log(s_p / s_q)

    Near p = q it is summed as a series, where the peer's form cancels; and it stays finite for s_p / s_q
    below 1e-23, where the peer's is infinite.

    Args:
        p, q: Normals whose shapes broadcast and whose dtypes promote to one; gradients reach the locs and
            scales of both.
        reduction, batch_ndim, impl: as in `vaeops.gaussian_kl`, over the broadcast shape.

    Returns:
        fp32 (fp64 if one of the four tensors is).

    Raises:
        TypeError: p or q is no Normal (an Independent keeps its own at `.base_dist`).
    """
    for name, d in (("p", p), ("q", q)):
        if not isinstance(d, Normal):
            raise TypeError(f"kl_normal: {name} must be a torch.distributions.Normal, got {type(d).__name__}")
    parts = p.loc, p.scale, q.loc, q.scale
    shape = torch.broadcast_shapes(p.loc.shape, q.loc.shape)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in parts))
    mu, std, *prior = (t.to(dtype) for t in parts)
    return gaussian_kl(
        mu.expand(shape),
        std.expand(shape),
        prior=(prior[0], prior[1]),
        param="std",
        reduction=reduction,
        batch_ndim=0 if reduction == "none" else batch_ndim,
        impl=impl,
    )

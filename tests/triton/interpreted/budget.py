"""The error budget: |ours - fp64| <= factor * (largest |eager - fp64| + 1 ulp), eager being the reference in ours' dtype."""

import torch
from torch import Tensor


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at the fp64 values x."""
    info = torch.finfo(dtype)
    return x.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps


def check(ours: Tensor, eager: Tensor, exact: Tensor, factor: float) -> float:
    """Raises where ours is out of budget; returns the largest share of it used. NaN and Inf must sit where exact's do."""
    assert ours.shape == exact.shape and ours.dtype == eager.dtype, (ours.shape, exact.shape, ours.dtype, eager.dtype)
    assert exact.dtype is torch.float64
    if not ours.numel():
        return 0.0
    finite = exact.isfinite() & (exact.abs() <= torch.finfo(ours.dtype).max)
    same = torch.where(exact.isnan(), ours.isnan(), ours.double() == exact.to(ours.dtype).double())
    assert bool((finite | same).all()), (ours[~(finite | same)], exact[~(finite | same)])
    want = exact[finite]
    step = ulp(want, ours.dtype)
    if ours.dtype is torch.bfloat16:
        factor += 1  # the interpreter truncates to bf16 where a GPU rounds: one ulp more
    allowed = factor * ((eager[finite].double() - want).abs().max() + step) if want.numel() else step
    share = ((ours[finite].double() - want).abs() / allowed).max().item() if want.numel() else 0.0
    assert share <= 1, f"{share:.2f} of the error budget"
    return share

"""The error budget: |ours - fp64| <= factor * (largest |eager - fp64| + 1 ulp).

Here eager is the reference in ours' dtype.
"""

import torch
from torch import Tensor


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at the fp64 values x."""
    info = torch.finfo(dtype)
    return x.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps


def check(ours: Tensor, eager: Tensor, exact: Tensor, factor: float) -> float:
    """Raises where over budget; returns the largest share used. NaN and Inf must sit where exact's do."""
    assert ours.shape == exact.shape and ours.dtype == eager.dtype, (
        ours.shape,
        exact.shape,
        ours.dtype,
        eager.dtype,
    )
    assert exact.dtype is torch.float64
    if not ours.numel():
        return 0.0
    finite = exact.isfinite() & (exact.abs() <= torch.finfo(ours.dtype).max)
    same = torch.where(exact.isnan(), ours.isnan(), ours.double() == exact.to(ours.dtype).double())
    assert bool((finite | same).all()), (ours[~(finite | same)], exact[~(finite | same)])
    want, eager = exact[finite], eager[finite].double()
    step = ulp(want, ours.dtype)
    if (
        ours.dtype is torch.float64
    ):  # exact is not: it has roundings of its own, of the size of its largest terms
        step = 16 * step.max()
    if ours.dtype is torch.bfloat16:
        factor += 1  # the interpreter truncates to bf16 where a GPU rounds: one ulp more
    if not want.numel():
        return 0.0
    allowed = factor * ((eager - want).abs().nan_to_num(0, 0).max() + step)
    share = ((ours[finite].double() - want).abs() / allowed).max().item()
    assert share <= 1, f"{share:.2f} of the error budget"
    return share

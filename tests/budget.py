"""The tolerance of this library: an error budget, not a number.

The largest |ours - exact| may be at most `factor` times (the largest |eager - exact| + 1 ulp of the largest
value), where eager is the textbook formula in the same dtype and exact is fp64: ours may not be worse than
what it replaces. The factor is 2 for values and 3 for gradients. Nobody tunes a tolerance, and the share that
was used is printed (`pytest -s`).
"""

import math

import torch
from torch import Tensor


def assert_within_budget(
    ours: Tensor, exact: Tensor, eager: Tensor, name: str, *, factor: float = 2.0
) -> float:
    """Fails where ours is outside its budget; returns the share of the budget that was used."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    x, y, e = (t.detach().double() for t in (ours, exact, eager))
    representable = y.abs() <= torch.finfo(ours.dtype).max
    assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN in other places than the reference's"
    assert bool(x[representable].isfinite().all()), f"{name}: not finite where the reference is"
    if not bool(representable.any()):
        return 0.0
    x, y, e = x[representable], y[representable], e[representable]
    largest = max(float(y.abs().max()), torch.finfo(ours.dtype).tiny)
    ulp = 2.0 ** math.floor(math.log2(largest)) * torch.finfo(ours.dtype).eps
    eager_error = float((e - y).abs().nan_to_num(nan=0.0, posinf=0.0).max())
    used = float((x - y).abs().max()) / (factor * (eager_error + ulp))
    print(f"{name}: {used:.0%} of the error budget")
    assert used <= 1, f"{name}: {used:.2f} times the error budget ({ours.dtype})"
    return used

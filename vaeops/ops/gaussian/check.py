"""Argument checks of the Gaussian family: each names the argument, what came and what is taken."""

import math

import torch
from torch import Tensor

from ...ref.gaussian import PARAMS, REDUCTIONS
from .. import rng

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INF = math.inf


def pair(op: str, a: str, b: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two floating tensors of one dtype and device, broadcast to one shape."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        name, wrong = (b, y) if isinstance(x, Tensor) else (a, x)
        raise TypeError(f"{op}: {name} must be a tensor, got {type(wrong).__name__}")
    dtype, device, shape = x.dtype, x.device, x.shape
    if dtype not in FLOATS:
        raise TypeError(f"{op}: {a} must be float32, bfloat16, float16 or float64, got {dtype}")
    if y.dtype is not dtype:
        raise TypeError(f"{op}: {b} must have {a}'s dtype {dtype}, got {y.dtype}")
    if y.device != device:
        raise ValueError(f"{op}: {b} is on {y.device}, it must be on {a}'s device {device}")
    if y.shape != shape:
        # By hand: an exception out of broadcast_tensors would have another text under torch.compile.
        if any(m != n and m != 1 and n != 1 for m, n in zip(shape[::-1], y.shape[::-1])):
            raise ValueError(f"{op}: {b} {list(y.shape)} does not broadcast with {a} {list(shape)}")
        x, y = torch.broadcast_tensors(x, y)
    return x, y


def options(op: str, mu: Tensor, packed_dim: int, param: str, clamp: tuple[float, float] | None,
            reduction: str, batch_ndim: int, temperature: float) -> tuple:  # fmt: skip
    """The low-level op's options, in its order."""
    if param not in PARAMS:
        raise ValueError(f"{op}: param must be one of {PARAMS}, got {param!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not isinstance(batch_ndim, int) or isinstance(batch_ndim, bool):
        raise TypeError(f"{op}: batch_ndim must be an int, got {type(batch_ndim).__name__}")
    if not 0 <= batch_ndim <= mu.dim():
        where = f"[0, {mu.dim()}] for shape {list(mu.shape)}"
        raise ValueError(f"{op}: batch_ndim must be in {where}, got {batch_ndim}")
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"{op}: temperature must be a float, got {type(temperature).__name__}")
    if not 0 <= temperature < _INF:
        raise ValueError(f"{op}: temperature must be finite and >= 0, got {temperature}")
    lo, hi = (-_INF, _INF) if clamp is None else _bounds(op, clamp)
    codes = PARAMS.index(param), REDUCTIONS.index(reduction)
    return packed_dim, codes[0], lo, hi, codes[1], batch_ndim, float(temperature)


def _bounds(op: str, clamp: tuple[float, float]) -> tuple[float, float]:
    is_pair = isinstance(clamp, (tuple, list)) and len(clamp) == 2
    if not is_pair or not all(isinstance(c, (int, float)) for c in clamp):
        raise TypeError(f"{op}: clamp must be None or two floats (lo, hi), got {clamp!r}")
    lo, hi = clamp
    if not lo <= hi:
        raise ValueError(f"{op}: clamp must have lo <= hi, got {clamp!r}")
    return float(lo), float(hi)


def prior_pair(op: str, prior: tuple[Tensor, Tensor] | None, mu: Tensor) -> tuple:
    """(mu_p, rho_p), of one shape that broadcasts to mu's; None for N(0, I)."""
    if prior is None:
        return None, None
    is_pair = isinstance(prior, (tuple, list)) and len(prior) == 2
    if not is_pair or not all(isinstance(p, Tensor) for p in prior):
        raise TypeError(f"{op}: prior must be None or two tensors (mu_p, logvar_p), got {_describe(prior)}")
    mu_p, rho_p = prior
    for p in (mu_p, rho_p):
        if p.dtype not in FLOATS:
            raise TypeError(f"{op}: prior must be floating point, got {p.dtype}")
        if p.device != mu.device:
            raise ValueError(f"{op}: prior is on {p.device}, it must be on {mu.device}")
        if p.dim() > mu.dim() or any(s not in (1, m) for s, m in zip(p.shape[::-1], mu.shape[::-1])):
            raise ValueError(f"{op}: prior {list(p.shape)} does not broadcast to {list(mu.shape)}")
    if mu_p.shape != rho_p.shape:  # a small tensor meets a small tensor: let autograd sum the difference
        mu_p, rho_p = torch.broadcast_tensors(mu_p, rho_p)
    return mu_p, rho_p


def _describe(x: object) -> str:
    return f"({', '.join(type(i).__name__ for i in x)})" if isinstance(x, (tuple, list)) else type(x).__name__


def noise(op: str, mu: Tensor, batch_ndim: int, seed: Tensor | None, generator: torch.Generator | None,
           eps: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(seed, eps), exactly one of them given, drawing a fresh seed where the caller gave neither."""
    if seed is None and generator is None and eps is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), device=mu.device), None
    if (seed is not None) + (generator is not None) + (eps is not None) > 1:
        given = [n for n, v in (("seed", seed), ("generator", generator), ("eps", eps)) if v is not None]
        raise ValueError(f"{op}: give one of seed, generator and eps, got {' and '.join(given)}")
    if eps is not None:
        rng.check_eps(op, eps, mu)
        return None, eps
    if generator is not None:
        rng.check_generator(op, generator, mu.device)
        return rng.make_seed(mu.device, generator), None
    assert seed is not None
    rng.check_seed(op, seed, mu.device, tuple(mu.shape[:batch_ndim]))
    if seed.dim() - 1 > batch_ndim:
        raise ValueError(f"{op}: seed {list(seed.shape)} has more stream dims than batch_ndim={batch_ndim}")
    return seed, None

"""Vector quantization's test inputs, and its definition written a second time, independently of vaeops.ref.

The oracle finds, by one matrix product in fp64 with a proven error bound, the few codes that can be nearest,
and scores those by the definition, a fused multiply-add chain. For fp64 inputs the fma is the C library's.
"""

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

INF = math.inf

_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3


def _chain(a: Tensor, b: Tensor, fused: bool) -> Tensor:
    """sum_d a[:, d] b[:, d], in order, each step rounded once; [M]."""
    if fused:
        totals = []
        for row, other in zip(a.tolist(), b.tolist()):
            total = 0.0
            for p, q in zip(row, other):
                total = _libm.fma(p, q, total)
            totals.append(total)
        return torch.tensor(totals, dtype=torch.float64)
    total = torch.zeros(len(a), dtype=torch.float64)
    for d in range(a.shape[1]):
        total = total + a[:, d] * b[:, d]  # the product is exact: 24 + 24 bits in 53
    return total


def _canonical(x: Tensor, e: Tensor, metric: str, fused: bool) -> Tensor:
    """The score of each pair of rows x [M, D], e [M, D] in fp64."""
    t = _chain(x, e, fused)
    if metric == "dot":
        return -t
    h = _chain(e, e, fused)
    # NumPy's root is correctly rounded; torch's is not.
    return 0.5 * h - t if metric == "l2" else -t / torch.from_numpy(np.sqrt(h.numpy()))


def scores(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """All scores [N, K] by the definition; +inf where a code is never chosen. For small sizes."""
    fused = torch.float64 in (x.dtype, codebook.dtype)
    v, e = x.double(), codebook.double()
    n, k = len(v), len(e)
    s = _canonical(v.repeat_interleave(k, 0), e.repeat(n, 1), metric, fused).view(n, k)
    bad = ~e.isfinite().all(1) | (metric == "cosine") & (e == 0).all(1)
    return torch.where(bad | ~v.isfinite().all(1, keepdim=True), INF, s)


def nearest(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The index of each row of x [N, D] by the definition, [N] int64. All values finite, no zero code."""
    fused = torch.float64 in (x.dtype, codebook.dtype)
    v, e = x.double(), codebook.double()
    h = e.square().sum(1)
    unit = 4 * (v.shape[1] + 4) * 2.0**-53
    result = []
    for part in v.split(max(1, (1 << 22) // len(e))):
        t, reach = part @ e.t(), part.norm(dim=1, keepdim=True) * h.sqrt()
        s = {"l2": 0.5 * h - t, "dot": -t, "cosine": -t / h.sqrt()}[metric]
        # A matrix product and a chain differ from the true sum by less than unit / 2 of its terms' size each.
        bound = unit * {"l2": reach + 0.5 * h, "dot": reach, "cosine": reach / h.sqrt()}[metric]
        bound = bound + 5e-324
        row, code = (s - bound <= (s + bound).amin(1, keepdim=True)).nonzero(as_tuple=True)
        exact = torch.cat([_canonical(part[r], e[c], metric, fused)
                           for r, c in zip(row.split(1 << 18), code.split(1 << 18))])  # fmt: skip
        best = torch.full((len(part),), INF, dtype=torch.float64).scatter_reduce(0, row, exact, "amin")
        first = torch.full((len(part),), len(e)).scatter_reduce(
            0, row, torch.where(exact == best[row], code, len(e)), "amin"
        )
        result.append(first)
    return torch.cat(result) if result else torch.empty(0, dtype=torch.int64)


# Every one makes (x [N, D], codebook [K, D]) in fp32.


def _gauss(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def _fitted(n, k, d):
    """Codes that are means of a few rows, as k-means leaves them."""
    x = torch.randn(n, d) * torch.linspace(0.1, 2, d)
    rows = torch.cat((x, torch.randn(k, d)))
    return x, rows[torch.randint(len(rows), (k, 4))].mean(1)


def _unit_norm(n, k, d):
    return tuple(torch.nn.functional.normalize(a, dim=1) for a in _gauss(n, k, d))


def _taming(n, k, d):
    """The usual initialisation: codes that are tiny beside x."""
    return torch.randn(n, d), (2 * torch.rand(k, d) - 1) / k


def _offset(by):
    return lambda n, k, d: tuple(a + by for a in _gauss(n, k, d))


def _low_rank(n, k, d):
    basis = torch.randn(2, d)
    return torch.randn(n, 2) @ basis, torch.randn(k, 2) @ basis + 1e-4 * torch.randn(k, d)


def _heavy_tails(n, k, d):
    return tuple(torch.empty(m, d).cauchy_().clamp(-1e12, 1e12) for m in (n, k))


def _scaled(by):
    return lambda n, k, d: tuple(a * by for a in _gauss(n, k, d))


def _duplicates(n, k, d):
    few = torch.randn(3, d)
    return torch.randn(n, d), few[torch.randint(3, (k,))]


def _near_duplicates(n, k, d):
    """One cluster of codes a few ulp apart: no fast pass can tell them apart."""
    return torch.randn(n, d), torch.randn(1, d) * (1 + 1e-6 * torch.randn(k, d))


def _codes_themselves(n, k, d):
    e = torch.randn(k, d)
    return e[torch.randint(k, (n,))], e


def _midpoints(n, k, d):
    """Half-way between two codes, or one ulp off."""
    e = torch.randn(k, d)
    x = (e[torch.randint(k, (n,))] + e[torch.randint(k, (n,))]) / 2
    return torch.where(torch.rand(n, 1) < 0.5, x, torch.nextafter(x, torch.full_like(x, INF))), e


def _integers(n, k, d):
    """Many exact ties."""
    return torch.randint(-1, 2, (n, d)).float(), torch.randint(-1, 2, (k, d)).float()


DISTRIBUTIONS = {
    "gauss": _gauss,
    "fitted": _fitted,
    "unit norm": _unit_norm,
    "taming": _taming,
    "offset 20": _offset(20),
    "offset 100": _offset(100),
    "low rank": _low_rank,
    "heavy tails": _heavy_tails,
    "denormals": _scaled(1e-41),
    "scale 1e15": _scaled(1e15),
    "scale 1e-15": _scaled(1e-15),
    "duplicates": _duplicates,
    "near duplicates": _near_duplicates,
    "codes themselves": _codes_themselves,
    "midpoints": _midpoints,
    "integers": _integers,
}

# (N, K, D): every D, K and residue that a kernel blocks by; small, since each implementation runs them all.
SHAPES = [
    (0, 5, 3), (1, 1, 1), (63, 2, 1), (97, 63, 2), (63, 64, 3), (63, 65, 7), (97, 512, 8), (63, 1000, 16),
    (33, 63, 31), (65, 513, 32), (1, 1000, 63), (257, 512, 64), (31, 65, 65), (17, 1000, 96), (63, 64, 128),
    (16, 129, 192), (15, 512, 256), (7, 65, 320), (17, 64, 512), (5, 33, 768), (3, 63, 1024), (2, 8192, 64),
    (1, 16384, 8),
]  # fmt: skip

LARGE = [
    (4097, 1000, 3), (4097, 8192, 8), (16384, 1024, 16), (4097, 512, 31), (4097, 8192, 64), (4097, 1000, 64),
    (1025, 1000, 65), (1025, 512, 192), (4097, 1024, 256), (1025, 1000, 768), (513, 16384, 256),
    (64, 262144, 8), (300, 65536, 32),
]  # fmt: skip


def eager(x: Tensor, codebook: Tensor) -> Tensor:
    """The formula that users write, in the dtype at hand."""
    return (x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.t()).argmin(1)

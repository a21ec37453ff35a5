"""The noise alone: standard normals, fp32. The rival is torch.randn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import vaeops
from vaeops.ref import rng as ref

from ..case import Inputs, Row, normality_share, our_impls

_PROBE = 1 << 16  # the reference is far too slow for every normal of a large case


def probes(n: int) -> list[tuple[int, int]]:
    """Ranges at both ends of n elements; each begins at a multiple of 4, where a stream can be entered."""
    start = max(0, n - _PROBE) // 4 * 4
    return [(0, min(n, _PROBE)), (start, n)]


def probe_noise(seed: Tensor, begin: int, end: int) -> Tensor:
    """The normals that `seed` draws there, by the reference on the CPU."""
    return ref.normal((end - begin,), vaeops.rng.advance(seed.cpu(), begin)).to(seed.device)


@dataclass(frozen=True)
class NormalCase:
    name: str
    elements: int
    small: bool
    family: str = "rng"
    dtype: torch.dtype = torch.float32
    ceiling: str = "copy"
    work_backward: int = 0
    memory: str = "kept"

    @property
    def work_forward(self) -> int:
        return 4 * self.elements

    def inputs(self, device: torch.device) -> Inputs:
        return Inputs((torch.empty(0, device=device),), None)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        shape = (self.elements,)

        def draw(impl: str | None):
            def normal(at: Tensor) -> tuple[Tensor, Tensor]:
                seed = vaeops.rng.make_seed(at.device)
                return vaeops.rng.normal(shape, seed, impl=impl), seed

            return normal

        rival = Row("torch.randn", lambda at: (torch.randn(shape, device=at.device),))
        return [rival, *(Row(name, draw(impl), ours=True) for name, impl in our_impls(device))]

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        noise, *seed = row.call(*inputs.leaves)
        shares = {"moments": normality_share(noise)}
        if seed:
            same = all(torch.equal(noise[a:b], probe_noise(*seed, a, b)) for a, b in probes(self.elements))
            shares["bits"] = 0.0 if same else math.inf
        return shares


CASES = [
    NormalCase("2^16", 1 << 16, small=True),
    NormalCase("2^20", 1 << 20, small=False),
    NormalCase("2^24", 1 << 24, small=False),
]

"""The Gaussian step: sample and KL of q = N(mu, sigma^2) against N(0, I).

Every row draws its own noise, as in training, so rows cannot be compared with each other. The check reads a
row's noise back from its z and asks whether KL and gradients are those of that noise. Ours must also have
drawn what its seed says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vaeops
from vaeops.ref import gaussian as ref

from ..case import COMPILE, Inputs, Row, budget_share, cotangents, normality_share, our_impls
from .rng import probe_noise, probes

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FREE_BITS = 0.05  # nats a dimension


def _total(kl: Tensor, reduction: str) -> Tensor:
    """Per-element KL [B, ...] to "sample" [B], "batchmean" [] or, for "dim", the free-bits sum []."""
    if reduction == "dim":
        return kl.mean(0).clamp(min=FREE_BITS).sum()
    kl = kl.flatten(1).sum(1)
    return kl.mean() if reduction == "batchmean" else kl


def textbook(mu: Tensor, logvar: Tensor, reduction: str, eps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What tutorials write."""
    z = mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps)
    return z, _total(-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()), reduction)


def diffusers_formula(moments: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """What diffusers' DiagonalGaussianDistribution computes: clamp, deviation and variance by an exp each."""
    mean, logvar = torch.chunk(moments, 2, dim=1)
    logvar = torch.clamp(logvar, -30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mean + std * torch.randn(mean.shape, device=mean.device, dtype=mean.dtype)
    return z, _total(0.5 * (mean.pow(2) + var - 1.0 - logvar), reduction)


@dataclass(frozen=True)
class GaussianCase:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reduction: str = "sample"  # "dim" stands for free bits on the batch mean of each dimension
    packed: bool = False
    channels_last: bool = False
    small: bool = False
    wrapper: bool = False  # so small that only the cost of a call shows: adds rows that take the call apart
    ceiling: str = "copy"
    memory: str = "kept"

    @property
    def family(self) -> str:
        return "gaussian-wrapper" if self.wrapper else "gaussian"

    @property
    def name(self) -> str:
        kind = "freebits" if self.reduction == "dim" else self.reduction
        parts = ["packed"] * self.packed + ["x".join(map(str, self.shape)), _DTYPES[self.dtype], kind]
        return "-".join(parts + ["channels-last"] * self.channels_last)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def work_forward(self) -> int:  # mu, logvar in; z out
        return 3 * self.dtype.itemsize * self.elements

    @property
    def work_backward(self) -> int:  # the gradient of z, mu, logvar in; their gradients out
        return 5 * self.dtype.itemsize * self.elements

    def inputs(self, device: torch.device) -> Inputs:
        mu, logvar, grad_z = (torch.randn(self.shape, device=device).to(self.dtype) for _ in range(3))
        if self.channels_last:
            mu, logvar, grad_z = (t.to(memory_format=torch.channels_last) for t in (mu, logvar, grad_z))
        halves = (mu * 0.5, logvar * 0.5)
        leaves = (torch.cat(halves, dim=1),) if self.packed else halves
        return Inputs(tuple(t.requires_grad_() for t in leaves), grad_z)

    def _split(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return leaves[0].chunk(2, dim=1) if self.packed else leaves

    def _ours(self, impl: str | None, **options) -> Callable[..., tuple]:
        if self.packed:
            clamp = (-30.0, 20.0)
            return lambda moments: vaeops.reparam_kl_packed(
                moments, clamp=clamp, reduction=self.reduction, impl=impl
            )
        if self.reduction == "dim":

            def free_bits(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
                z, kl, seed = vaeops.reparam_kl(mu, logvar, reduction="dim", impl=impl)
                return z, kl.clamp(min=FREE_BITS).sum(), seed

            return free_bits
        return lambda mu, logvar: vaeops.reparam_kl(
            mu, logvar, reduction=self.reduction, impl=impl, **options
        )

    def _low_level(self, device: torch.device) -> Callable[..., tuple]:
        seed = vaeops.rng.make_seed(device)
        op, code = torch.ops.vaeops.gaussian_fwd.default, ref.REDUCTIONS.index(self.reduction)

        def call(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z, kl = op(mu, logvar, None, None, seed, None, 0, 0, -math.inf, math.inf, code, 1, 1.0)
            return z, kl, seed

        return call

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        def eager(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            return textbook(*self._split(leaves), self.reduction)

        rows = [Row("eager", eager)]
        if compiled:
            rows.append(Row(COMPILE, torch.compile(eager, fullgraph=True, dynamic=False)))
        if self.packed:
            rows.append(Row("diffusers", lambda moments: diffusers_formula(moments, self.reduction)))
        rows += [Row(name, self._ours(impl), ours=True) for name, impl in our_impls(device)]
        if self.wrapper:
            seed = vaeops.rng.make_seed(device)
            rows.append(Row("vaeops, seed given", self._ours(None, seed=seed), ours=True))
            rows.append(Row("vaeops, low-level op", self._low_level(device), ours=True, backward=False))
            if compiled:
                ours = torch.compile(self._ours(None), fullgraph=True, dynamic=False)
                rows.append(Row("vaeops, compiled", ours, ours=True))
        return rows

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        leaves = inputs.leaves if row.backward else tuple(t.detach() for t in inputs.leaves)
        outputs = row.call(*leaves)
        z = outputs[0].detach()
        mu, logvar = (t.detach() for t in self._split(leaves))
        noise = (z.double() - mu.double()) / (0.5 * logvar.double()).exp()
        shares = {"noise": normality_share(noise)}
        if len(outputs) > 2:
            shares["z"] = max(
                self._sample_share(z, mu, logvar, outputs[2], *probe) for probe in probes(z.numel())
            )

        def formula(dtype: torch.dtype, rule: Callable) -> tuple[Tensor, ...]:
            copies = tuple(t.detach().to(dtype).requires_grad_(row.backward) for t in leaves)
            out = rule(*self._split(copies), noise.to(dtype))
            if not row.backward:
                return (out[1],)
            grads = torch.autograd.grad(out, copies, cotangents(out, Inputs(copies, inputs.grad_z.to(dtype))))
            return out[1].detach(), *grads

        exact = formula(torch.float64, self._exact)
        eager = formula(z.dtype, lambda m, lv, eps: textbook(m, lv, self.reduction, eps))
        got = (outputs[1].detach(),)
        if row.backward:
            got += torch.autograd.grad(outputs[:2], leaves, cotangents(outputs, inputs))
        names = ("kl", *("grad moments",) * self.packed, *("grad mu", "grad logvar") * (not self.packed))
        for name, *triple, factor in zip(names, got, exact, eager, (2.0, 3.0, 3.0)):
            shares[name] = budget_share(*triple, factor)
        return shares

    def _exact(self, mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        z, kl, _ = ref.reparam_kl(mu, logvar, eps=eps, reduction="none")
        return z, _total(kl, self.reduction)

    @staticmethod
    def _sample_share(z: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, begin: int, end: int) -> float:
        z, mu, logvar = (t.flatten()[begin:end] for t in (z, mu, logvar))
        noise = probe_noise(seed, begin, end)
        exact = mu.double() + (0.5 * logvar.double()).exp() * noise.double()
        eager = mu + torch.exp(0.5 * logvar) * noise.to(mu.dtype)
        return budget_share(z, exact, eager, 2.0)


_LARGE = (64, 16, 128, 128)
CASES = [
    GaussianCase(_LARGE, torch.float32, "sample"),
    GaussianCase(_LARGE, torch.float32, "batchmean"),
    GaussianCase(_LARGE, torch.bfloat16, "sample"),
    GaussianCase(_LARGE, torch.bfloat16, "batchmean"),
    GaussianCase(_LARGE, torch.float32, "sample", channels_last=True),
    GaussianCase((16, 16, 128, 128)),
    GaussianCase((8, 16, 128, 128)),
    GaussianCase((4096, 256)),
    GaussianCase((4096, 256), reduction="dim"),
    GaussianCase((32, 4, 64, 64), packed=True),
    GaussianCase((128, 20), reduction="batchmean", small=True),
    GaussianCase((128, 20), reduction="dim", small=True),
    GaussianCase((4, 4, 8, 8), packed=True, small=True),
    GaussianCase((8, 4), reduction="batchmean", small=True, wrapper=True),
]

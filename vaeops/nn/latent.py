"""The latent of a VAE as modules: the sampling layer, its KL's weight over time, a watch on its health."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import objectives
from ..ops import gaussian as fused
from ..ops.gaussian import LatentOutput
from ..ref import gaussian as ref

OPS = {"fused": fused, "ref": ref}


class GaussianLatent(nn.Module):
    """Sample of q = N(mu, sigma^2) and its KL, as a layer: `vaeops.reparam_kl` with the options given here.

    In training z is drawn; in eval z is the mode, the very tensor mu, unless the call gives noise (seed,
    generator or eps).

    Args:
        param, clamp, reduction, batch_ndim, temperature, impl: as in `vaeops.reparam_kl`.
        ops: "fused" for vaeops' kernels, "ref" for the differentiable specification in `vaeops.ref`.

    Shapes: mu, logvar [*B, *E] -> LatentOutput(z [*B, *E], kl by `reduction`, seed or None).
    """

    def __init__(self, *, param: str = "logvar", clamp: tuple[float, float] | None = None,
                 reduction: str = "batchmean", batch_ndim: int = 1, temperature: float = 1.0,
                 impl: str | None = None, ops: str = "fused") -> None:  # fmt: skip
        super().__init__()
        if ops not in OPS:
            raise ValueError(f"GaussianLatent: ops must be one of {tuple(OPS)}, got {ops!r}")
        self.ops = ops
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "param": param,
            "clamp": clamp,
            "reduction": reduction,
            "batch_ndim": batch_ndim,
            "impl": impl,
        }

    def forward(self, mu: Tensor, logvar: Tensor, *, prior: tuple[Tensor, Tensor] | None = None,
                seed: Tensor | None = None, generator: torch.Generator | None = None,
                eps: Tensor | None = None) -> LatentOutput:  # fmt: skip
        """prior, seed, generator, eps: as in `vaeops.reparam_kl`."""
        ops = OPS[self.ops]
        if self.training or not (seed is None and generator is None and eps is None):
            return ops.reparam_kl(mu, logvar, prior=prior, temperature=self.temperature, seed=seed,
                                  generator=generator, eps=eps, **self.options)  # fmt: skip
        kl = ops.gaussian_kl(mu, logvar, prior=prior, **self.options)
        return LatentOutput(torch.broadcast_tensors(mu, logvar)[0], kl, None)

    def extra_repr(self) -> str:
        options = {**self.options, "temperature": self.temperature, "ops": self.ops}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class KLSchedule(nn.Module):
    """The KL's weight (or capacity) over training: `objectives.anneal` of a step counter on the device.

    Calling it gives a 0-d fp32 tensor on the module's device: a changing weight neither recompiles a graph
    nor waits for the device, and the counter travels in the state_dict.

        beta = KLSchedule("cyclical", steps=10_000, cycles=4).to(device)
        loss = recon + beta() * kl;  ...;  beta.step()

    Args:
        kind: "constant" | "linear" | "cyclical" | "cosine" | "sigmoid"; formulas in `objectives.anneal`.
        options: those of `objectives.anneal` that the kind reads: stop for all; steps, start for all but
            "constant"; cycles, ratio for "cyclical"; steepness for "sigmoid". Any other raises.
    """

    count: Tensor
    _READS: ClassVar = {
        "constant": {"stop"},
        "linear": {"stop", "steps", "start"},
        "cosine": {"stop", "steps", "start"},
        "cyclical": {"stop", "steps", "start", "cycles", "ratio"},
        "sigmoid": {"stop", "steps", "start", "steepness"},
    }

    def __init__(self, kind: str = "linear", **options: Any) -> None:
        super().__init__()
        if kind not in self._READS:
            raise ValueError(f"KLSchedule: kind must be one of {tuple(self._READS)}, got {kind!r}")
        unread = sorted(set(options) - self._READS[kind])
        if unread:
            raise TypeError(
                f"KLSchedule: {kind!r} does not read {unread}; it reads {sorted(self._READS[kind])}"
            )
        if kind != "constant" and "steps" not in options:
            raise TypeError(f"KLSchedule: {kind!r} needs steps")
        self.kind, self.options = kind, options
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self()  # a bad option shows here, not at the first training step

    def forward(self) -> Tensor:
        return objectives.anneal(self.count, self.kind, **self.options)

    @torch.no_grad()
    def step(self) -> None:
        """One step on. Traces under torch.compile and in a CUDA graph."""
        self.count.add_(1)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *(f"{name}={value!r}" for name, value in self.options.items())])


class PosteriorMonitor(nn.Module):
    """Running health of a latent: KL per dimension, active units, collapse. No host sync until read.

        latent = reparam_kl(mu, logvar, reduction="dim");  monitor.update(mu, latent.kl)
        ...;  print(monitor.summary());  monitor.reset()

    A unit is active when the variance over the data of its posterior mean exceeds `threshold` (Burda et al.,
    2016). Averages run over every sample since `reset`; the network moves meanwhile, so reset every epoch.
    Each process of a data-parallel run keeps its own; leave the monitor outside the module that
    DistributedDataParallel wraps, since it broadcasts the buffers inside.

    Args:
        shape: D, or the latent's shape [*E].
        threshold: of variance for an active unit, and of nats for a dimension that carries nothing.

    Buffers: count int64 [], kl, mean, m2 fp32 [*E].
    """

    count: Tensor
    kl: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, shape: int | tuple[int, ...], threshold: float = 0.01) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for name in ("kl", "mean", "m2"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Moves with the model, but stays fp32 under .half() and .bfloat16()."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype is not buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    def update(self, mu: Tensor, kl_dim: Tensor) -> None:
        """mu [*B, *E], the posterior means of a batch; kl_dim [*E], its KL by `reduction="dim"`."""
        shape = self.kl.shape
        if kl_dim.shape != shape or mu.shape[mu.dim() - len(shape) :] != shape or mu.dim() == len(shape):
            raise ValueError(
                f"PosteriorMonitor: mu must be [*B, *{list(shape)}] and kl_dim {list(shape)}, "
                f"got {list(mu.shape)} and {list(kl_dim.shape)}"
            )
        mu = mu.reshape(-1, *shape)
        count, mean, m2 = objectives.merge_moments(self.count, self.mean, self.m2, mu)
        self.kl.lerp_(kl_dim.float(), mu.shape[0] / count.clamp(min=1).float())
        self.count.copy_(count)
        self.mean.copy_(mean)
        self.m2.copy_(m2)

    @torch.no_grad()
    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def variance(self) -> Tensor:
        """Var(E[z|x]), the variance over the data of the posterior mean: fp32 [*E], 0 before two samples."""
        return self.m2 / (self.count - 1).clamp(min=1)

    def active_units(self) -> Tensor:
        """int64 [] on the device."""
        return objectives.active_units(self.variance(), self.threshold)

    def collapsed(self) -> Tensor:
        """bool [] on the device: no dimension's KL exceeds the threshold."""
        return objectives.collapsed(self.kl, self.threshold)

    def summary(self) -> dict[str, Any]:
        """Python numbers, for a log: waits for the device."""
        return {
            "samples": int(self.count),
            "kl": float(self.kl.sum()),
            "active_units": int(self.active_units()),
            "collapsed": bool(self.collapsed()),
        }

"""`DiagonalGaussianDistribution` and `VectorQuantizer` of diffusers' autoencoders over the fused ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.gaussian import gaussian_kl, gaussian_log_prob, reparam_kl_packed
from .taming import VectorQuantizer2

_CLAMP = (-30.0, 20.0)


class DiagonalGaussianDistribution:
    """q = N(mean, exp(logvar)) from an autoencoder's moments, as diffusers' class has it.

    Args:
        parameters: [B, 2C, ...], any rank from 2 on: mean = first half of dim 1, logvar = second half,
            clamped to [-30, 20].
        deterministic: q is a point mass: `sample` gives the mean, std and var are 0, `kl` and `nll` are 0.

    Where it differs from the peer, on purpose:
        - `kl`, and `nll` by default, sum over every dim but the first. The peer sums over dims 1, 2, 3
          whatever the rank: for video [B, C, T, H, W] it returns [B, W], for [B, D] or [B, C, L] it raises.
        - `kl` and `nll` are fp32 for fp16 and bf16 moments. The peer's are in the input's dtype and overflow.
        - A deterministic `kl` or `nll` is zeros [B] on the moments' device; the peer's is a CPU tensor [1].
        - `kl` to a deterministic `other` raises; the peer divides by zero.
        - std, var and logvar are made when asked for, and cannot be assigned.

    `sample` takes the KL to N(0, I) in the same pass, and the next `kl()` returns it.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if not isinstance(parameters, Tensor):
            raise TypeError(
                f"DiagonalGaussianDistribution: parameters must be a tensor, got {type(parameters).__name__}"
            )
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"DiagonalGaussianDistribution: parameters must be [B, 2C, ...], got {list(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic
        self._kl: tuple[Tensor, Any, Tensor] | None = None  # made by sample(): (parameters, state, kl [B])

    @property
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, 1)[0]

    @property
    def logvar(self) -> Tensor:
        return self.parameters.chunk(2, 1)[1].clamp(*_CLAMP)

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """mean + std * eps, [B, C, ...] in the moments' dtype.

        Args:
            generator: torch's own normals from it, so that z is the peer's z; or one generator a sample. A
                CPU generator serves moments on another device, as with the peer. None: vaeops' noise stream,
                made in the kernel.
        """
        eps = None if generator is None else self._draw(generator)
        if self.deterministic:
            return self.mean  # after the draw: the generator moves on, as with the peer
        z, kl, _ = reparam_kl_packed(self.parameters, clamp=_CLAMP, reduction="sample", eps=eps)
        self._kl = self.parameters, self._state(), kl
        return z

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self || other), or to N(0, I): [B] in nats, fp32 (fp64 for fp64). other: ours or the peer's."""
        if self.deterministic:
            return self._zero()
        mu, logvar = self.parameters.chunk(2, 1)
        if other is not None:
            if other.deterministic:
                raise ValueError(
                    "DiagonalGaussianDistribution.kl: other is deterministic, the KL to it is infinite"
                )
            mu, logvar, *prior = torch.broadcast_tensors(mu, logvar, other.mean, other.logvar)
            return gaussian_kl(mu, logvar, prior=prior, clamp=_CLAMP, reduction="sample")
        made, self._kl = self._kl, None  # handed out once: its graph can be freed with the caller's
        state = self._state()
        if made is not None and made[0] is self.parameters and state is not None and made[1] == state:
            return made[2]
        return gaussian_kl(mu, logvar, clamp=_CLAMP, reduction="sample")

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log q(sample) in nats, summed over `dims` (None: all but the first), fp32 (fp64 for fp64)."""
        if self.deterministic:
            return self._zero()
        dtype = torch.promote_types(sample.dtype, self.parameters.dtype)
        x, mu, logvar = sample.to(dtype), self.mean.to(dtype), self.logvar.to(dtype)
        rank = max(x.dim(), mu.dim())
        if dims is None or sorted(d % rank for d in dims) == list(range(1, rank)):
            return -gaussian_log_prob(x, mu, logvar, reduction="sample")
        return -gaussian_log_prob(x, mu, logvar, reduction="none").sum(tuple(dims))

    def mode(self) -> Tensor:
        return self.mean

    def _state(self) -> tuple[bool, int] | None:
        """A KL made by `sample` holds while this does: the grad mode, and the count of changes in place."""
        if torch.compiler.is_compiling():  # it has no version there
            return torch.is_grad_enabled(), 0
        return None if self.parameters.is_inference() else (torch.is_grad_enabled(), self.parameters._version)

    def _zero(self) -> Tensor:
        dtype = torch.float64 if self.parameters.dtype is torch.float64 else torch.float32
        return self.parameters.new_zeros(self.parameters.shape[0], dtype=dtype)

    def _draw(self, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        """torch.randn of the mean's shape, drawn on the generator's device; sample by sample for a list."""
        shape, dtype, device = self.mean.shape, self.parameters.dtype, self.parameters.device

        def draw(size: tuple[int, ...], g: torch.Generator) -> Tensor:
            return torch.randn(size, generator=g, device=g.device, dtype=dtype).to(device)

        if isinstance(generator, torch.Generator):
            return draw(shape, generator)
        if len(generator) == 1:
            return draw(shape, generator[0])
        if len(generator) != shape[0]:
            raise ValueError(
                f"DiagonalGaussianDistribution.sample: generator must be one, or one for each of "
                f"the {shape[0]} samples, got {len(generator)}"
            )
        return torch.cat([draw((1, *shape[1:]), g) for g in generator])


class VectorQuantizer(VectorQuantizer2):
    """diffusers' name for taming's `VectorQuantizer2`, with e_dim called vq_embed_dim; the rest as there."""

    def __init__(self, n_e: int, vq_embed_dim: int, beta: float, remap: str | None = None,
                 unknown_index: str | int = "random", sane_index_shape: bool = False,
                 legacy: bool = True) -> None:  # fmt: skip
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim

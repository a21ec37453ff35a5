"""The objective of a VAE as a module: reconstruction, and a KL term that may be weighed, floored or held."""

from typing import Any

from torch import Tensor, nn

from .. import objectives
from ..ops.gaussian import LatentOutput, gaussian_kl
from ..ops.recon import ElboOutput, recon_loss
from ..ref.gaussian import PARAMS
from ..ref.recon import KINDS
from .latent import KLSchedule

REDUCTIONS = ("batchmean", "sample")


class ELBOLoss(nn.Module):
    """Minus the evidence lower bound: reconstruction + beta * KL term.

    The KL term is one of
        kl                                             plain
        sum_d max(floor, kl_d)                         free_bits=floor, under each dim's batch mean
        |kl - C|                                       capacity=C, of the batch as a whole
    each a composition of `vaeops.objectives`.

        criterion = ELBOLoss("bce_logits", beta=KLSchedule("linear", steps=10_000))
        loss, recon, kl = criterion(decode(z), x, mu, logvar);  loss.backward();  criterion.beta.step()

    Args:
        kind: as in `vaeops.recon_loss`.
        beta: the KL's weight; a float, or a `KLSchedule`, which becomes a submodule.
        free_bits: nats under each latent dim; 0 for none.
        capacity: None, C in nats, or a `KLSchedule` of it. Not with free_bits.
        reduction: "batchmean" -> losses [], or "sample" -> [*B], for the plain KL alone.
        scale, batch_ndim, impl: as in `vaeops.recon_loss`. param: what `logvar` is, as in
            `vaeops.reparam_kl`.

    Raises:
        TypeError, ValueError: naming the option, when the module is made; or as the ops that it calls.
    """

    def __init__(self, kind: str, *, beta: float | KLSchedule = 1.0, free_bits: float = 0.0,
                 capacity: float | KLSchedule | None = None, reduction: str = "batchmean",
                 scale: float | None = None, batch_ndim: int = 1, param: str = "logvar",
                 impl: str | None = None) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"ELBOLoss: kind must be one of {KINDS}, got {kind!r}")
        if param not in PARAMS:
            raise ValueError(f"ELBOLoss: param must be one of {PARAMS}, got {param!r}")
        _check_number("beta", beta, KLSchedule)
        _check_number("free_bits", free_bits)
        if free_bits < 0:
            raise ValueError(f"ELBOLoss: free_bits must be >= 0, got {free_bits}")
        if capacity is not None:
            _check_number("capacity", capacity, KLSchedule)
        if reduction not in REDUCTIONS:
            raise ValueError(f"ELBOLoss: reduction must be one of {REDUCTIONS}, got {reduction!r}")
        if free_bits and capacity is not None:
            raise ValueError("ELBOLoss: give one of free_bits and capacity")
        if reduction == "sample" and (free_bits or capacity is not None):
            raise ValueError("ELBOLoss: free_bits and capacity are of a batch: reduction must be 'batchmean'")
        self.kind, self.beta, self.free_bits, self.capacity = kind, beta, free_bits, capacity
        self.param, self.reduction = param, reduction
        self.options: dict[str, Any] = {"batch_ndim": batch_ndim, "impl": impl}
        self.scale = scale

    @property
    def kl_reduction(self) -> str:
        """How a `LatentOutput` that is handed in must have been reduced."""
        return "dim" if self.free_bits else self.reduction

    def forward(self, pred: Tensor, target: Tensor, mu: Tensor | LatentOutput,
                logvar: Tensor | None = None, *, prior: tuple[Tensor, Tensor] | None = None,
                weight: Tensor | None = None, mask: Tensor | None = None) -> ElboOutput:  # fmt: skip
        """pred, target, weight, mask: as in `vaeops.recon_loss`; prior as in `vaeops.reparam_kl`.

        mu, logvar: the posterior's; or in place of mu, and without logvar and prior, what `reparam_kl`
        returned for reduction=`kl_reduction`.

        Returns ElboOutput(loss, recon, kl); kl is the plain KL, whatever the loss makes of it.
        """
        if isinstance(mu, Tensor):
            if logvar is None:
                raise TypeError("ELBOLoss: logvar is missing beside mu")
            kl = gaussian_kl(mu, logvar, prior=prior, param=self.param, reduction=self.kl_reduction,
                             **self.options)  # fmt: skip
        elif logvar is not None or prior is not None:
            raise TypeError("ELBOLoss: a LatentOutput has its KL: give no logvar or prior beside it")
        else:
            kl = mu.kl
        recon = recon_loss(pred, target, self.kind, reduction=self.reduction, scale=self.scale, weight=weight,
                           mask=mask, **self.options)  # fmt: skip
        shape = recon.shape
        if self.kl_reduction == "dim":
            shape = (mu if isinstance(mu, Tensor) else mu.z).shape[self.options["batch_ndim"] :]
        if kl.shape != shape:
            raise ValueError(
                f"ELBOLoss: the latent's kl must be reduced by {self.kl_reduction!r} to {list(shape)}, "
                f"got {list(kl.shape)}"
            )
        term = kl
        if self.free_bits:
            term, kl = objectives.free_bits(kl, self.free_bits), kl.sum()
        elif self.capacity is not None:
            term = objectives.capacity(kl, _now(self.capacity))
        return ElboOutput(recon + _now(self.beta) * term, recon, kl)

    def extra_repr(self) -> str:
        names = ("kind", "beta", "free_bits", "capacity", "reduction", "scale", "param")
        shown = {
            n: getattr(self, n) for n in names if not isinstance(getattr(self, n), nn.Module)
        } | self.options
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _check_number(name: str, value: object, *others: type) -> None:
    if not isinstance(value, (int, float, *others)) or isinstance(value, bool):
        what = " or a ".join(["a float", *(t.__name__ for t in others)])
        raise TypeError(f"ELBOLoss: {name} must be {what}, got {type(value).__name__}")


def _now(value: float | KLSchedule) -> float | Tensor:
    return value() if isinstance(value, KLSchedule) else value

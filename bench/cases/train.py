"""A whole training step: forward, backward, Adam. Every row trains the same nets, on one resident batch.

The rivals are what people write: the nets, `torch.randn`, PyTorch's losses, the KL's formula, forward hooks
on a whole VGG16; or vector-quantize-pytorch's layer between the nets. "eager" has torch.optim.Adam as it
comes, all other rows its fused one. Step 1 is checked: with the same weights, images and noise, the loss and
all gradients. Noise is drawn in front of what is compiled, so that a compiled row can be given it.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vaeops
from vaeops import rng
from vaeops.models import create
from vaeops.models.protocol import row_seeds

from ..case import COMPILE, Inputs, Row, our_impls
from .perceptual import PER_PIXEL, Hooks

RECON: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_logits": lambda p, x: F.binary_cross_entropy_with_logits(p, x, reduction="sum") / len(x),
    "l1": lambda p, x: F.l1_loss(p, x, reduction="sum") / len(x),
    "mse": F.mse_loss,
}
# Relative difference of the loss, and of all gradients in L2, that is allowed. A VGG's ReLUs flip more; rows
# between two codes take another one by distances in fp32, or where compiled nets round differently.
BUDGET, WIDER_BUDGET = 1e-4, 1e-3
Loss = Callable[[Tensor, Any], Tensor]


def latent(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z and the KL, a batch's mean."""
    z = mu + eps * torch.exp(0.5 * logvar)
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu)


def reconstruction(kind: str, pred: Tensor, x: Tensor) -> Tensor:
    return RECON[kind](pred, x)


def eager_vae(model: Any, hooks: Hooks | None) -> Loss:
    def loss(x: Tensor, eps: Tensor) -> Tensor:
        mu, logvar = model.encoder(x).chunk(2, 1)
        z, kl = latent(mu, logvar, eps)
        pred = model.decoder(z)
        total = reconstruction(model.recon, pred, x) + kl
        if hooks is not None:
            total = total + model.weights["perceptual"] * hooks(pred, x)[0] / len(x)
        return total

    return loss


def eager_vq(model: Any) -> Loss:
    """`model.quantize`: images [B, D, H, W] -> (quantized, indices, commitment loss, weighted)."""

    def loss(x: Tensor, _: None) -> Tensor:
        quantized, _, commit = model.quantize(model.encoder(x))
        return reconstruction("mse", model.decoder(quantized), x) + commit.sum()

    return loss


def our_vae(model: Any) -> Loss:
    def loss(x: Tensor, seed: Tensor) -> Tensor:
        losses = model.losses(model(x, seed=seed), x)
        total = losses["recon"] + losses["kl"].sum()
        if "perceptual" in losses:
            total = total + model.weights["perceptual"] * losses["perceptual"]
        return total

    return loss


def our_vq(model: Any) -> Loss:
    def loss(x: Tensor, _: None) -> Tensor:
        losses = model.terms(x).losses
        return losses["recon"] + model.weights["commit"] * losses["commit"]

    return loss


class Step:
    """What a row is timed on. noise: what the loss takes beside images, "eps", "seed" or None."""

    def __init__(self, model: Any, loss: Loss, noise: str | None, *, fused: bool, compiled: bool) -> None:
        self.model, self.noise = model.train(), noise
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.optimizer = torch.optim.Adam(model.parameters(), fused=fused or None)

    def __call__(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor]:
        if noise is None and self.noise == "eps":
            noise = torch.randn(len(x), self.model.latent_dim, device=x.device)
        elif noise is None and self.noise == "seed":
            noise = rng.make_seed(x.device)
        self.optimizer.zero_grad()
        loss = self.loss(x, noise)
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)


class Start(NamedTuple):
    """Images, weights and noise that every row's first step takes, and what it must give."""

    x: Tensor
    state: dict[str, Tensor]
    noise: dict[str | None, Tensor | None]
    loss: Tensor
    gradients: list[Tensor]


@lru_cache(maxsize=1)
def _start(case: "StepCase", device: torch.device) -> Start:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.model(device, "ref").train()
        lo, hi = model.input_range
        x = (torch.rand(case.batch, *model.input_shape) * (hi - lo) + lo).to(device)
    loss, noise = case.reference(model, x), {None: None}
    if hasattr(model, "latent_dim"):
        noise["seed"] = torch.tensor([2, 0], device=device)
        noise["eps"] = rng.normal((case.batch, model.latent_dim), row_seeds(noise["seed"], case.batch, 0))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    value = loss(x, noise.get("seed"))
    value.backward()
    return Start(x, state, noise, value.detach(), [p.grad for p in model.parameters()])


@dataclass(frozen=True)
class StepCase:
    """A VAE. perceptual: with the distance of a VGG16's maps, its weights random. options: the model's."""

    preset: str
    batch: int
    perceptual: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    small: bool = False
    family: str = "step"
    dtype: torch.dtype = torch.float32
    ceiling: str = "matmul"
    work_backward: int = 0  # it is part of the step
    memory: str = "kept"

    @property
    def name(self) -> str:
        parts = [self.preset, "perceptual" * self.perceptual, "small" * self.small, f"b{self.batch}"]
        return "-".join(filter(None, parts))

    @property
    def elements(self) -> int:  # images
        return self.batch

    @cached_property
    def work_forward(self) -> int:
        """Of products and convolutions, both ways: the nets', the VGG's up to its last tap, the codes'."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = create(self.preset, **dict(self.options))
            x = torch.empty(self.batch, *model.input_shape)
            self.nets(model, x).sum().backward()
        return counter.get_total_flops() + self.beside_nets(model, x)

    def beside_nets(self, model: Any, x: Tensor) -> int:
        return 3 * PER_PIXEL * x[:, 0].numel() if self.perceptual else 0

    def nets(self, model: Any, x: Tensor) -> Tensor:
        return model.decoder(model.encoder(x).chunk(2, 1)[0])

    def model(self, device: torch.device, ops: str = "fused") -> Any:
        options = dict(self.options) | ({"trunk": _trunk(device)} if self.perceptual else {})
        return create(self.preset, **options, ops=ops).to(device)

    def reference(self, model: Any, x: Tensor) -> Loss:
        return our_vae(model)

    def inputs(self, device: torch.device) -> Inputs:
        return Inputs((_start(self, device).x.clone(),), None)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        def rival(fused: bool, compiled: bool) -> Step:
            model = self.model(device)
            hooks = Hooks(_trunk(device).sequential(), "sum") if self.perceptual else None
            return Step(model, eager_vae(model, hooks), "eps", fused=fused, compiled=compiled)

        rows = [Row("eager", rival(False, False), step=True),
                Row("eager, fused Adam", rival(True, False), step=True)]  # fmt: skip
        if compiled:
            rows.append(Row(f"{COMPILE}, fused Adam", rival(True, True), step=True))
        return rows + self.our_rows(our_vae, "seed", device, compiled)

    def our_rows(self, loss: Callable[[Any], Loss], noise: str | None, device: torch.device,
                 compiled: bool) -> list[Row]:  # fmt: skip
        def step(compiled: bool) -> Step:
            model = self.model(device)
            return Step(model, loss(model), noise, fused=True, compiled=compiled)

        rows = [Row(our_impls(device)[0][0], step(False), ours=True, step=True)]
        if compiled:
            rows.append(Row(f"vaeops, {COMPILE}", step(True), ours=True, step=True))
        return rows

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        (x,), step = inputs.leaves, row.call
        assert isinstance(step, Step)
        start = _start(self, x.device)
        step.model.load_state_dict(start.state)
        (loss,) = step(x, start.noise[step.noise])
        between_codes = step.noise is None and (not row.ours or COMPILE in row.name)
        allowed = WIDER_BUDGET if self.perceptual or between_codes else BUDGET
        named = dict(step.model.named_parameters())
        gradients = zip((p.grad for p in named.values()), start.gradients, strict=True)
        lost = sum(float((g - exact).double().square().sum()) for g, exact in gradients) ** 0.5
        size = sum(float(exact.double().square().sum()) for exact in start.gradients) ** 0.5
        stood = all(torch.equal(p, start.state[name]) for name, p in named.items())
        return {
            "loss": float((loss - start.loss).abs() / start.loss.abs()) / allowed,
            "gradients": lost / size / allowed,
            "weights that Adam left": float("inf") if stood else 0.0,
        }


@dataclass(frozen=True)
class VQStepCase(StepCase):
    """A VQ-VAE; the peer's layer learns and revives codes as ours does."""

    family: str = "step-vq"

    @property
    def name(self) -> str:
        return f"{super().name}-K{dict(self.options)['codes']}"

    def beside_nets(self, model: Any, x: Tensor) -> int:
        return 2 * len(x) * math.prod(model.grids[0]) * model.quantize.codebook.numel()

    def nets(self, model: Any, x: Tensor) -> Tensor:
        return model.decoder(model.encoder(x))

    def reference(self, model: Any, x: Tensor) -> Loss:
        """The nearest codes by distances in fp64. The codebook starts as rows of the batch."""
        book = model.quantize._codebook
        with torch.no_grad():
            rows = model.encoder(x).movedim(1, -1).flatten(0, -2)
            chosen = torch.linspace(0, len(rows) - 1, book.embed.shape[1], device=x.device).long()
            for state in (book.embed, book.embed_avg):
                state.copy_(rows[chosen])
        codebook = model.quantize.codebook.clone()

        def quantize(h: Tensor) -> tuple[Tensor, None, Tensor]:
            rows = h.movedim(1, -1)
            far = [
                torch.cdist(r.double(), codebook.double()).argmin(1) for r in rows.flatten(0, -2).split(1024)
            ]
            q = codebook[torch.cat(far)].view(rows.shape).movedim(-1, 1)
            return h + (q - h).detach(), None, model.weights["commit"] * F.mse_loss(h, q)

        model.quantize.forward = quantize
        return eager_vq(model)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        mine = self.our_rows(our_vq, None, device, compiled)
        if importlib.util.find_spec("vector_quantize_pytorch") is None:
            return mine
        from vector_quantize_pytorch import VectorQuantize

        def rival(compiled: bool) -> Step:
            model = self.model(device)
            codes, dim = model.quantize.codebook.shape
            model.quantize = VectorQuantize(
                dim, codes, decay=0.99, threshold_ema_dead_code=1, rotation_trick=False,
                accept_image_fmap=True, commitment_weight=model.weights["commit"],
            ).to(device)  # fmt: skip
            return Step(model, eager_vq(model), None, fused=True, compiled=compiled)

        rows = [Row("lucidrains", rival(False), step=True)]
        if compiled:
            rows.append(Row(COMPILE, rival(True), step=True))
        return rows + mine


@lru_cache(maxsize=1)
def _trunk(device: torch.device) -> vaeops.VGGTrunk:
    return vaeops.VGGTrunk.random("vgg16", seed=0, input_range=(-1, 1), normalize=None).to(device)


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


CASES = [
    StepCase("vae-mlp", 128),
    StepCase("vae-conv", 256),
    StepCase("celeba-vae", 64, perceptual=True),
    StepCase("celeba-vae-xl", 2, perceptual=True),
    VQStepCase("vq-vae", 64, options=_options(codes=512)),
    VQStepCase("vq-vae", 64, options=_options(codes=8192)),
    StepCase("vae-mlp", 16, options=_options(in_dim=36, hidden=(16, 12), latent=3), small=True),
    StepCase("celeba-vae", 2, perceptual=True, options=_options(side=32, width=4, latent=6), small=True),
    VQStepCase("vq-vae", 4, options=_options(side=16, hidden=16, inner=8, dim=8, codes=32), small=True),
]

"""Reconstruction losses: the loss, and the gradient of what the decoder made."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vaeops
from vaeops.ref import recon as ref

from ..case import COMPILE, Inputs, Row, budget_share, our_impls


def _pixels(target: Tensor, dtype: torch.dtype) -> Tensor:
    return target.to(dtype) / 255 if target.dtype is torch.uint8 else target


def _total(loss: Callable, **options) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, t: loss(p, _pixels(t, p.dtype), reduction="sum", **options) / p.shape[0]


# What tutorials write: summed over a sample, averaged over the batch.
TEXTBOOK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce_logits": _total(F.binary_cross_entropy_with_logits),
    "mse": _total(F.mse_loss),
    "l1": _total(F.l1_loss),
    "multinomial": lambda p, t: -(F.log_softmax(p, 1) * t).sum(1).mean(),
}


@dataclass(frozen=True)
class ReconCase:
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    target: torch.dtype = torch.float32
    small: bool = False
    family: str = "recon"
    ceiling: str = "copy"
    memory: str = "kept"

    @property
    def name(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
        parts = [self.kind, "x".join(map(str, self.shape)), names[self.dtype]]
        return "-".join(parts + [names[self.target]] * (self.target is not self.dtype))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def work_forward(self) -> int:  # pred and target in
        return (self.dtype.itemsize + self.target.itemsize) * self.elements

    @property
    def work_backward(self) -> int:  # the same in, the gradient of pred out
        return self.work_forward + self.dtype.itemsize * self.elements

    def inputs(self, device: torch.device) -> Inputs:
        pred = torch.randn(self.shape, device=device).to(self.dtype).requires_grad_()
        if self.kind == "multinomial":  # a few of the items, as a user's history has them
            target = (torch.rand(self.shape, device=device) < 0.01).to(self.target)
        elif self.target is torch.uint8:
            target = torch.randint(0, 256, self.shape, dtype=torch.uint8, device=device)
        else:
            target = torch.rand(self.shape, device=device).to(self.target)
        return Inputs((pred, target), torch.tensor(0.75, device=device))

    def _ours(self, impl: str | None) -> Callable[..., tuple]:
        return lambda pred, target: (vaeops.recon_loss(pred, target, self.kind, impl=impl),)

    def rows(self, device: torch.device, compiled: bool) -> list[Row]:
        textbook = TEXTBOOK[self.kind]

        def eager(pred: Tensor, target: Tensor) -> tuple[Tensor]:
            return (textbook(pred, target),)

        rows = [Row("eager", eager)]
        if compiled:
            rows.append(Row(COMPILE, torch.compile(eager, fullgraph=True, dynamic=False)))
        return rows + [
            Row(name, self._ours(impl), ours=True) for name, impl in our_impls(device, "recon_fwd")
        ]

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        pred, target = inputs.leaves

        def results(call: Callable, pred: Tensor) -> tuple[Tensor, Tensor]:
            leaf = pred.detach().requires_grad_()
            (loss,) = call(leaf, target)
            return loss.detach(), torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.75))[0]

        exact = results(lambda p, t: (ref.recon_loss(p, t, self.kind),), pred.double())
        eager = results(lambda p, t: (TEXTBOOK[self.kind](p, t),), pred)
        triples = zip(("loss", "grad pred"), results(row.call, pred), exact, eager, (2.0, 3.0))
        return {name: budget_share(*triple, factor) for name, *triple, factor in triples}


_IMAGES = (256, 3, 64, 64)
CASES = [
    ReconCase("bce_logits", _IMAGES),
    ReconCase("bce_logits", _IMAGES, target=torch.uint8),
    ReconCase("mse", _IMAGES),
    ReconCase("mse", _IMAGES, target=torch.uint8),
    ReconCase("l1", _IMAGES),
    ReconCase("multinomial", (512, 100_000)),
    ReconCase("bce_logits", (128, 784), small=True),
    ReconCase("multinomial", (16, 1000), small=True),
]

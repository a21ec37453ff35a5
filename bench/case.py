"""What the runner asks of a benchmark case: inputs, rows, bytes moved, and a check made before any timing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

COMPILE = "torch.compile"
STEP = "training step"  # a direction


class Inputs(NamedTuple):
    """One set of inputs. A case on a GPU gets several, so that no call finds its inputs in the cache."""

    leaves: tuple[Tensor, ...]  # what a row is called with; they want gradients
    grad_z: Tensor | None  # cotangent of the first output; None: the case has no backward


@dataclass(frozen=True)
class Row:
    """One competitor. `call(*leaves)` returns (z, kl, ...), (loss,) or, without backward, (x, ...)."""

    name: str
    call: Callable[..., tuple]
    ours: bool = False
    # False: forward only, on inputs that want no gradient, and not checked by gradients
    backward: bool = True
    step: bool = False  # a call is a whole training step, backward and optimizer included


class Case(Protocol):
    family: str
    name: str
    small: bool  # belongs to `--quick` and to the plain `pytest bench`
    elements: int  # of a training step: its images
    dtype: torch.dtype
    # What bounds the fused kernel: "copy" (its work is bytes: every input read once, every output written
    # once) or "matmul" (its work is floating-point operations).
    ceiling: str
    work_forward: int
    work_backward: int  # 0: the case has no backward, or calls it itself
    memory: str  # what is told of a CPU's memory: "kept" for backward, or the "peak" above the inputs

    def inputs(self, device: torch.device) -> Inputs: ...

    def rows(self, device: torch.device, compiled: bool) -> list[Row]: ...

    def check(self, row: Row, inputs: Inputs) -> dict[str, float]:
        """Share of the error budget that each result uses; above 1 the row is wrong, and so is NaN."""
        ...


def cotangents(outputs: tuple, inputs: Inputs) -> list[Tensor]:
    """Gradients handed to backward: the case's own for the first output, not 1 for the second."""
    assert inputs.grad_z is not None
    return [inputs.grad_z, *(torch.full_like(other, 0.5) for other in outputs[1:2])]


def our_impls(device: torch.device, op: str | None = None) -> list[tuple[str, str | None]]:
    """(row name, impl=) of our implementations, first the one that serves the device, which is not forced.

    op: a low-level op, where not all ops have the same.
    """
    from vaeops.ops._library import serving, why_not

    best = serving(device.type, op)
    names = [best] + [
        i for i in ("cuda", "triton") if device.type == "cuda" and i != best and not why_not(i, "cuda", op)
    ]
    return [(f"vaeops ({name})", None if name == best else name) for name in names]


def budget_share(got: Tensor, exact: Tensor, eager: Tensor, factor: float) -> float:
    """Worst error over what is allowed: factor * (same-dtype eager's worst + 1 ulp of the largest value)."""
    exact = exact.double()
    ulp = torch.finfo(eager.dtype).eps * exact.abs().amax()
    allowed = factor * ((eager.double() - exact).abs().amax() + ulp)
    return ((got.double() - exact).abs().amax() / allowed).item()


def normality_share(noise: Tensor) -> float:
    """How far mean and variance of standard normals stray, in units of six standard deviations of each."""
    n, noise = noise.numel(), noise.double()
    return (
        max(noise.mean().abs().item() * n**0.5, abs(noise.var(correction=0).item() - 1) * (n / 2) ** 0.5) / 6
    )

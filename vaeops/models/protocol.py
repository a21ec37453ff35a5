"""What the reference models have in common: the terms they return, their noise, the checks of their input."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng

OPS = ("fused", "ref")


class Terms(NamedTuple):
    """What `model.terms(x)` returns.

    losses: unweighted fp32 batch means [], in a fixed order; "kl" is [latent], so that free bits and capacity
        can follow. monitors: detached numbers [] worth logging. Neither waits for the device.
    """

    losses: dict[str, Tensor]
    monitors: dict[str, Tensor]


def impl_of(ops: str) -> str | None:
    """The `impl=` of vaeops' ops behind a model's `ops="fused" | "ref"`."""
    if ops not in OPS:
        raise ValueError(f"ops must be one of {OPS}, got {ops!r}")
    return "ref" if ops == "ref" else None


def row_seeds(seed: Tensor, n: int, row: int) -> Tensor:
    """A stream for each of n samples, the first of them sample `row` of the joined batch: int64 [n, 2].

    So parts of a batch draw what the whole would, whatever the number of elements in a sample.
    """
    return rng.fold_in(seed, torch.arange(row, row + n, device=seed.device))


def check_x(model: Any, x: Tensor) -> None:
    """x must be [B, *model.input_shape]."""
    if tuple(x.shape[1:]) != model.input_shape:
        wanted = ", ".join(map(str, model.input_shape))
        raise ValueError(f"{type(model).__name__}: x must be [B, {wanted}], got {list(x.shape)}")


def check_sizes(model: Any, least: int = 1, **sizes: Any) -> None:
    """Each must be an integer of at least `least`."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or int(size) < least:
            raise ValueError(
                f"{type(model).__name__}: {name} must be an integer of at least {least}, got {size!r}"
            )


def check_widths(model: Any, least: int = 0, **widths: Any) -> None:
    """Each must be a sequence, of `least` or more positive integers."""
    for name, given in widths.items():
        right = isinstance(given, Sequence) and len(given) >= least
        if not right or not all(isinstance(width, Integral) and int(width) > 0 for width in given):
            some = "at least one positive integer" if least else "positive integers"
            raise ValueError(f"{type(model).__name__}: {name} must be a sequence of {some}, got {given!r}")


def check_weights(model: Any, **weights: Any) -> None:
    """The weight of a loss must be a number of at least 0."""
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
            raise ValueError(f"{type(model).__name__}: {name} must be finite and at least 0, got {weight!r}")


def check_label(model: Any, label: Tensor | None, n: int) -> None:
    """A model with classes wants int64 [n]; one without looks at no label."""
    if not model.classes:
        return
    name = type(model).__name__
    if label is None:
        raise ValueError(f"{name}: label must be given, int64 [B] below {model.classes}")
    if label.dtype is not torch.int64:
        raise TypeError(f"{name}: label must be int64, got {label.dtype}")
    if label.shape != (n,):
        raise ValueError(f"{name}: label must be [{n}], got {list(label.shape)}")

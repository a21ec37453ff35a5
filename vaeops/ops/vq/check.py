"""Argument checks of the vector-quantization family: each names the argument, what came and what is taken."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("exact", "fast")


def floating(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def on(op: str, name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {device}")


def codebook(op: str, e: Tensor, name: str = "codebook", ndim: int = 2) -> None:
    floating(op, name, e)
    letters = "[Q, K, D]" if ndim == 3 else "[K, D]"
    if e.dim() != ndim:
        raise ValueError(f"{op}: {name} must have shape {letters}, got {list(e.shape)}")
    if 0 in e.shape:
        raise ValueError(f"{op}: {name} must hold at least one element, got shape {list(e.shape)}")


def channel_dim(op: str, dim: int, rank: int) -> int:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{op}: channel_dim must be an int, got {type(dim).__name__}")
    if not -rank <= dim < rank:
        raise ValueError(f"{op}: channel_dim must be in [{-rank}, {rank - 1}], got {dim}")
    return dim % rank


def rows(op: str, x: Tensor, e: Tensor, dim: int, codebook_ndim: int = 2) -> Tensor:
    """x as [*R, D]: a view with the channel dim last. Checks x and the codebook against each other."""
    floating(op, "x", x)
    codebook(op, e, "codebook" if codebook_ndim == 2 else "codebooks", codebook_ndim)
    on(op, "codebook", e, x.device)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have at least one dim, got shape []")
    dim = channel_dim(op, dim, x.dim())
    if x.shape[dim] != e.shape[-1]:
        raise ValueError(
            f"{op}: x {list(x.shape)} must have the codebook's D = {e.shape[-1]} along dim {dim}, "
            f"got {x.shape[dim]}"
        )
    return x if dim == x.dim() - 1 else x.movedim(dim, -1)


def mask(op: str, m: Tensor | None, x: Tensor) -> None:
    """None, or bool of the shape of the rows [*R, D]'s leading dims."""
    if m is None:
        return
    if not isinstance(m, Tensor):
        raise TypeError(f"{op}: mask must be None or a bool tensor, got {type(m).__name__}")
    if m.dtype is not torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {m.dtype}")
    on(op, "mask", m, x.device)
    if m.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: mask must have x's shape without the channel dim, {list(x.shape[:-1])}, "
            f"got {list(m.shape)}"
        )


def indices(op: str, idx: Tensor, device: torch.device) -> None:
    if not isinstance(idx, Tensor):
        raise TypeError(f"{op}: indices must be a tensor, got {type(idx).__name__}")
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be int64 or int32, got {idx.dtype}")
    on(op, "indices", idx, device)


def one_of(op: str, name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")
    return choices.index(value)


def exact(op: str, precision: str) -> bool:
    return one_of(op, "precision", precision, PRECISIONS) == 0


def int32(op: str, index_dtype: torch.dtype) -> bool:
    if index_dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: index_dtype must be torch.int64 or torch.int32, got {index_dtype!r}")
    return index_dtype is torch.int32


def number(op: str, name: str, value: float, low: float, high: float, closed: str = "[]") -> float:
    """A float between low and high; `closed` says with a bracket which of the two may be met."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    above = value >= low if closed[0] == "[" else value > low
    below = value <= high if closed[1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{op}: {name} must be in {closed[0]}{low:g}, {high:g}{closed[1]}, got {value}")
    return float(value)


def count(op: str, name: str, value: int, high: int | None = None) -> int:
    """An int from 1 to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1 or (high is not None and value > high):
        bound = "at least 1" if high is None else f"in [1, {high}]"
        raise ValueError(f"{op}: {name} must be {bound}, got {value}")
    return value

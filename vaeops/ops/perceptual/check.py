"""Argument checks of the perceptual family: each names the argument, what came and what is taken."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...ref import perceptual as ref

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def one_of(op: str, name: str, value: Any, choices: tuple) -> int:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")
    return choices.index(value)


def number(op: str, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    if not abs(value) < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def trunk(op: str, value: Any, device: torch.device | None = None) -> None:
    """A VGGTrunk, known by its `cut`, since ops know no modules."""
    if not hasattr(value, "cut"):
        raise TypeError(f"{op}: trunk must be a vaeops.VGGTrunk, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: trunk is on {value.device}, it must be on x's device {device}")


def image(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS and x.dtype is not torch.uint8:
        took = "float32, bfloat16, float16, float64 or uint8"
        raise TypeError(f"{op}: {name} must be {took}, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"{op}: {name} must have shape [B, 3, H, W], got {list(x.shape)}")


def same_image(op: str, x: Tensor, target: Tensor) -> None:
    if target.shape != x.shape:
        raise ValueError(f"{op}: target must have x's shape {list(x.shape)}, got {list(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"{op}: target is on {target.device}, it must be on x's device {x.device}")


def target_maps(op: str, x: Tensor, maps: Sequence[Tensor], shapes: Sequence[tuple], fp64: bool) -> None:
    """Cached maps [B, K, h, w] against x and the taps that they are for."""
    types = [torch.float32, torch.bfloat16]
    if fp64 or x.dtype is torch.float64:
        types.append(torch.float64)
    for m, shape in zip(maps, shapes):
        if tuple(m.shape) != shape:
            raise ValueError(f"{op}: target holds a map {list(m.shape)} where x has {list(shape)}")
        if m.dtype not in types:
            raise TypeError(f"{op}: target's maps must be float32 or bfloat16 for {x.dtype}, got {m.dtype}")
        if m.device != x.device:
            raise ValueError(f"{op}: target is on {m.device}, it must be on x's device {x.device}")


def terms(op: str, value: Any, kind: type, alone: bool) -> None:
    if not isinstance(value, Sequence) or not value or not all(isinstance(term, kind) for term in value):
        raise TypeError(f"{op}: terms must be a list of at least one vaeops.Term, got {value!r}")
    if not alone:
        raise ValueError(f"{op}: terms bring their own taps, kind, weights and lin; give them there")


def scalar(op: str, reduction: str, return_grad: bool) -> None:
    """What a trunk with batch statistics can give."""
    if reduction == "none":
        raise ValueError(f"{op}: reduction: bn='batch' mixes the images, so it must be 'mean' or 'sum'")
    if return_grad:
        raise ValueError(f"{op}: return_grad is not there for a trunk with bn='batch'")


def taps(op: str, arch: str, wanted: Any) -> tuple[int, ...]:
    """Codes of taps that are given by name or by torchvision's index, ascending."""
    if isinstance(wanted, (str, int)) or not isinstance(wanted, Sequence) or len(wanted) == 0:
        raise TypeError(f"{op}: taps must be a sequence of at least one name or index, got {wanted!r}")
    known, codes = ref.tap_codes(arch), []
    for tap in wanted:
        if isinstance(tap, bool) or not isinstance(tap, (str, int)):
            raise TypeError(f"{op}: taps must hold names and indices, got {tap!r}")
        if tap not in known:
            names = ", ".join(name for name in known if isinstance(name, str))
            last = max(name for name in known if isinstance(name, int))
            raise ValueError(f"{op}: taps: {arch} has no {tap!r}; it has {names} and the indices 0 to {last}")
        code = known[tap]
        if code is None:
            raise ValueError(
                f"{op}: taps: {tap} is a convolution of {arch} before its batch norm, which is part of it "
                "here; the next index comes after it"
            )
        codes.append(code)
    if any(a >= b for a, b in pairwise(codes)):
        raise ValueError(f"{op}: taps must be in the net's order, each once, got {tuple(wanted)}")
    return tuple(codes)


def deep_enough(op: str, x: Tensor, layers: Sequence[int]) -> None:
    """The deepest tap still has a pixel."""
    pools = sum(not channels for channels in layers)
    if x.shape[2] >> pools == 0 or x.shape[3] >> pools == 0:
        raise ValueError(
            f"{op}: x is {x.shape[2]} x {x.shape[3]} pixels, the deepest tap ({pools} pools) needs at least "
            f"{1 << pools} x {1 << pools}"
        )


def several_values(op: str, x: Tensor, layers: Sequence[int]) -> None:
    """Each channel of each convolution has a variance."""
    height, width = x.shape[2:]
    for channels in layers:
        if not channels:
            height, width = height // 2, width // 2
        elif x.shape[0] * height * width == 1:
            raise ValueError(
                f"{op}: x: bn='batch' needs more than 1 value per channel at each convolution, one image of "
                f"{x.shape[2]} x {x.shape[3]} pixels has 1 before the deepest tap"
            )


def weights(op: str, name: str, values: Any, count: int) -> tuple[float, ...]:
    """A number for each tap; None: 1."""
    if values is None:
        return (1.0,) * count
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{op}: {name} must be None or a number for each tap, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{op}: {name} must hold a number for each of the {count} taps, got {len(values)}")
    return tuple(number(op, name, v) for v in values)


def lin(op: str, value: Any, channels: Sequence[int], device: torch.device) -> list[Tensor]:
    """The linear weights of "lpips": a tensor [K] for each tap."""
    if not isinstance(value, (tuple, list)):
        got = type(value).__name__
        raise TypeError(f"{op}: lin must be a list of one tensor [K] a tap for kind='lpips', got {got}")
    if len(value) != len(channels):
        raise ValueError(f"{op}: lin must hold a tensor for each of {len(channels)} taps, got {len(value)}")
    return [lin_tensor(op, w, c, device) for w, c in zip(value, channels)]


def lin_tensor(op: str, w: Any, channels: int, device: torch.device) -> Tensor:
    if not isinstance(w, Tensor):
        raise TypeError(f"{op}: lin must hold tensors, got {type(w).__name__}")
    if w.dtype not in FLOATS:
        raise TypeError(f"{op}: lin must be floating point, got {w.dtype}")
    if w.shape != (channels,):
        raise ValueError(f"{op}: lin must have shape [{channels}] at this tap, got {list(w.shape)}")
    if w.device != device:
        raise ValueError(f"{op}: lin is on {w.device}, it must be on {device}")
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: lin gets no gradient, give lin.detach()")
    return w if w.dtype is torch.float64 else w.float()


def maps(op: str, a: Any, b: Any) -> None:
    """Two feature maps [B, C, h, w], not of nothing, of one floating dtype, shape and device."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            took = "float32, bfloat16, float16 or float64"
            raise TypeError(f"{op}: {name} must be {took}, got {x.dtype}")
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape [B, C, h, w], got {list(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"{op}: {name} must have channels and pixels, got shape {list(x.shape)}")
    if b.dtype is not a.dtype:
        raise TypeError(f"{op}: b must have a's dtype {a.dtype}, got {b.dtype}")
    if b.device != a.device:
        raise ValueError(f"{op}: b is on {b.device}, it must be on a's device {a.device}")
    if b.shape != a.shape:
        raise ValueError(f"{op}: b must have a's shape {list(a.shape)}, got {list(b.shape)}")


def double(op: str, impl: str | None, fp64: bool) -> str | None:
    """The implementation: fp64 images and fp64 trunks run the reference."""
    if fp64 and impl not in (None, "ref"):
        raise ValueError(f"{op}: impl={impl!r} computes in fp32; for float64 give impl=None or 'ref'")
    return "ref" if fp64 else impl

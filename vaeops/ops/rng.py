"""The noise stream: explicit seeds, and normals that are the same bits on every device.

A seed is an int64 tensor [2] = (key, offset) on the device that draws. Element i of a stream is lane i % 4 of
the Philox4x32-10 block with 64-bit counter offset + i // 4 under the key; two 32-bit words make two normals
by Box-Muller. i counts elements in logical (row-major) order, so noise depends neither on memory format nor
on threads, tiles or device. A seed [..., 2] is one stream per entry. Source: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

from ..ref import rng as ref
from ._library import check_impl, define, overloads


def _fake_normal(seed: Tensor, size: list[int]) -> Tensor:
    return seed.new_empty(size, dtype=torch.float32)


def _fake_fold_in(seed: Tensor, index: Tensor) -> Tensor:
    return seed.new_empty((*torch.broadcast_shapes(seed.shape[:-1], index.shape), 2))


def _triton_normal(seed: Tensor, size: list[int]) -> Tensor:
    from ..kernels import rng

    return rng.normal(seed, size)


def _triton_fold_in(seed: Tensor, index: Tensor) -> Tensor:
    from ..kernels import rng

    return rng.fold_in(seed, index)


define("normal", "(Tensor seed, SymInt[] size) -> Tensor",
       fake=_fake_normal, ref=lambda seed, size: ref.normal(size, seed), triton=_triton_normal)  # fmt: skip
define("fold_in", "(Tensor seed, Tensor index) -> Tensor",
       fake=_fake_fold_in, ref=lambda seed, index: ref.fold_in(seed, index),
       triton=_triton_fold_in)  # fmt: skip
_NORMAL, _FOLD_IN = overloads("normal"), overloads("fold_in")


def check_seed(
    op: str, seed: Tensor, device: torch.device | None = None, prefix: tuple[int, ...] | None = None
) -> None:
    """A seed is int64 [2], or [*S, 2] where S is a prefix of `prefix` (None: any S), on `device`."""
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"{op}: seed must be an int64 tensor [2] (vaeops.rng.make_seed), got {type(seed).__name__}"
        )
    if seed.dtype is not torch.int64:
        raise TypeError(f"{op}: seed must be int64, got {seed.dtype}")
    if seed.dim() < 1 or seed.shape[-1] != 2:
        raise ValueError(f"{op}: seed must have shape [2] or [..., 2], got {list(seed.shape)}")
    if device is not None and seed.device != device:
        raise ValueError(f"{op}: seed is on {seed.device}, it must be on {device}")
    if prefix is not None and seed.dim() > 1 and tuple(seed.shape[:-1]) != tuple(prefix[: seed.dim() - 1]):
        raise ValueError(
            f"{op}: seed {list(seed.shape)} must be [2], or [*S, 2] with S the leading batch dims of "
            f"{list(prefix)}"
        )


def make_seed(device: torch.device | str = "cpu", generator: torch.Generator | None = None,
              batch: int | tuple[int, ...] | None = None) -> Tensor:  # fmt: skip
    """A fresh seed, drawn by `torch.randint` from `generator` or the device's default generator.

    So `torch.manual_seed`, fork_rng and saved generator states govern it, two draws in one compiled graph
    differ, and checkpointing replays it. It costs one small launch and no host synchronisation.

    Args:
        device: where the noise will be drawn.
        generator: on that device. Does not trace: under torch.compile draw the seed outside and pass `seed=`.
        batch: B (or a tuple) for B seeds, one stream per sample.

    Returns:
        int64 [2], or [*batch, 2].

    Raises:
        ValueError: generator on another device, or given under torch.compile; negative batch.
    """
    device = torch.device(device)
    shape = () if batch is None else (batch,) if isinstance(batch, int) else tuple(batch)
    if any(not isinstance(b, int) or b < 0 for b in shape):
        raise ValueError(f"make_seed: batch must hold non-negative ints, got {batch!r}")
    if generator is None:
        return torch.randint(-(2**63), 2**63 - 1, (*shape, 2), device=device)
    return torch.randint(-(2**63), 2**63 - 1, (*shape, 2), device=device,
                         generator=check_generator("make_seed", generator, device))  # fmt: skip


def check_generator(op: str, generator: torch.Generator, device: torch.device) -> torch.Generator:
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: generator does not trace; draw the seed outside the compiled function with "
            "vaeops.rng.make_seed(device, generator) and pass seed="
        )
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"{op}: generator is on {generator.device}, it must be on {device}")
    return generator


def fold_in(seed: Tensor, index: int | Tensor) -> Tensor:
    """A child seed, independent of the parent's noise and of every other index's, say a rank's or a step's.

    Args:
        seed: int64 [..., 2].
        index: int >= 0 (below 2^63), or an int64 tensor of such, on the seed's device; broadcasts with
            seed[..., 0].

    Returns:
        int64 [..., 2]. The Philox block with counter (offset, index | top bit) under the seed's key: a
        counter that the noise stream never uses.
    """
    check_seed("fold_in", seed)
    if isinstance(index, Tensor):
        if index.dtype is not torch.int64:
            raise TypeError(f"fold_in: index must be an int or an int64 tensor, got {index.dtype}")
        if index.device != seed.device:
            raise ValueError(f"fold_in: index is on {index.device}, it must be on {seed.device}")
        if any(m != n and m != 1 and n != 1 for m, n in zip(seed.shape[-2::-1], index.shape[::-1])):
            raise ValueError(
                f"fold_in: index {list(index.shape)} does not broadcast with seeds {list(seed.shape[:-1])}"
            )
    elif not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"fold_in: index must be an int or an int64 tensor, got {type(index).__name__}")
    elif not 0 <= index < 2**63:
        raise ValueError(f"fold_in: index must be in [0, 2^63), got {index}")
    else:
        index = torch.full((), index, dtype=torch.int64, device=seed.device)
    return _FOLD_IN[None](seed, index)


def split(seed: Tensor, n: int) -> Tensor:
    """n child seeds of one seed: int64 [2] -> [n, 2]. Row i is `fold_in(seed, i)`."""
    check_seed("split", seed)
    if seed.dim() != 1:
        raise ValueError(f"split: seed must have shape [2], got {list(seed.shape)}")
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"split: n must be a non-negative int, got {n!r}")
    return _FOLD_IN[None](seed, torch.arange(n, device=seed.device))


def advance(seed: Tensor, elements: int | Tensor) -> Tensor:
    """The seed for the part of a batch that begins `elements` elements into it.

    A shard that draws from `advance(seed, first_row * D)` gets the very noise that the joined batch would
    have there: data-parallel ranks and one process on the whole batch then agree.

    Args:
        seed: int64 [..., 2].
        elements: a multiple of 4 (one Philox block makes 4 normals); int in [-2^65, 2^65), or int64 tensor
            on the seed's device, whose value is not checked, since that would synchronise.

    Raises:
        ValueError: elements is out of range, or no multiple of 4. Give each row its own stream then: a seed
            [B, 2].
    """
    check_seed("advance", seed)
    if isinstance(elements, Tensor):
        if elements.dtype is not torch.int64:
            raise TypeError(f"advance: elements must be an int or an int64 tensor, got {elements.dtype}")
        if elements.device != seed.device:
            raise ValueError(f"advance: elements is on {elements.device}, it must be on {seed.device}")
        blocks: int | Tensor = elements // 4
    elif not isinstance(elements, int) or isinstance(elements, bool):
        raise TypeError(f"advance: elements must be an int or an int64 tensor, got {type(elements).__name__}")
    elif elements % 4:
        raise ValueError(
            f"advance: elements must be a multiple of 4, got {elements}; "
            "give each row its own stream (a seed [B, 2]) instead"
        )
    elif not -(2**65) <= elements < 2**65:
        raise ValueError(f"advance: elements must be in [-2^65, 2^65), got {elements}")
    else:
        blocks = elements // 4
    return torch.stack(torch.broadcast_tensors(seed[..., 0], seed[..., 1] + blocks), dim=-1)


def normal(
    shape: list[int] | tuple[int, ...] | torch.Size, seed: Tensor, *, impl: str | None = None
) -> Tensor:
    """Standard normals of a seed, fp32: what every op of vaeops adds when it is given `seed=`.

    Args:
        shape: of the result, or of a part of it: with `advance` the part draws its own noise.
        seed: int64 [2], or [*S, 2] with S a prefix of shape: one stream per entry, counted from its first
            element.
        impl: None, or "ref" | "cpp" | "triton" | "cuda" to force one.

    Returns:
        fp32 tensor `shape` on the seed's device, |x| <= 6.76. No gradient. The same bits from every
        implementation.
    """
    if not isinstance(shape, (list, tuple)):
        raise TypeError(f"normal: shape must be a list or tuple of ints, got {type(shape).__name__}")
    size = tuple(shape)
    if any(not isinstance(s, (int, torch.SymInt)) or (isinstance(s, int) and s < 0) for s in size):
        raise ValueError(f"normal: shape must hold non-negative ints, got {shape!r}")
    check_seed("normal", seed, prefix=size)
    if seed.dim() - 1 > len(size):
        raise ValueError(f"normal: seed {list(seed.shape)} has more stream dims than shape {list(size)}")
    check_impl("normal", impl, seed)
    return _NORMAL[impl](seed, size)


def check_eps(op: str, eps: Tensor, like: Tensor) -> None:
    """Noise handed in by the caller: any floating dtype, the sample's shape and device, no gradient."""
    if not isinstance(eps, Tensor):
        raise TypeError(f"{op}: eps must be a tensor, got {type(eps).__name__}")
    if not eps.is_floating_point():
        raise TypeError(f"{op}: eps must be floating point, got {eps.dtype}")
    if eps.device != like.device:
        raise ValueError(f"{op}: eps is on {eps.device}, it must be on {like.device}")
    if eps.shape != like.shape:
        raise ValueError(
            f"{op}: eps must have the shape of the sample, {list(like.shape)}, got {list(eps.shape)}"
        )
    if eps.requires_grad:
        raise ValueError(f"{op}: eps gets no gradient; pass eps.detach()")

"""A frozen VGG trunk on a GPU, in chunks of images. Specification: vaeops/ref/perceptual.py.

Who makes a layer's convolution:
    first     (3 channels in) Triton, from the raw image of any strides and dtype
    narrow    (by_triton) Triton; bias, ReLU, mask, the pool that follows and taps are in its epilogue
    the rest  ATen, that is cuDNN; bias, ReLU, mask, pool and taps are one more pass
and the same going back, where the epilogue adds a tap's gradient and selects by the mask. Backward needs no
maps: `saved` holds, layer by layer, masks [B, h, w, K / 8] and pool codes [B, h, w, K / 4].

Precision. bf16: maps, weights and gradients are bf16, sums fp32; ATen's convolutions round before the bias
is added. fp32: cuDNN uses TF32 where torch.backends.cudnn allows it, which is PyTorch's default; Triton's
products follow the same setting and otherwise are 3 x TF32, about as exact as fp32. An image's results depend
on no other image, up to cuDNN's choice of an algorithm by the size of the chunk.

No launch waits for the host and nothing depends on a tensor's value, so a CUDA graph can capture all of it.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...ref.perceptual import (
    DISTANCES,
    Convolve,
    batchnorm_run,
    batchnorm_run_back,
    map_dtype,
    map_shapes,
    normalized,
    saved_bytes,
)
from .. import _layout as layout
from . import conv, distance, pool

CHUNK_BYTES = 256 << 20  # of a chunk's largest map
ALIGNMENT = 64  # bytes, of a packed tensor's parts
PLAIN = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)  # pixels as they are
NOTHING = (None, None, None)


def by_triton(C: int, K: int) -> bool:
    """Up to 64 channels a convolution waits for memory as long as for products. Not measured on a GPU yet."""
    return min(C, K) <= 64 and max(C, K) <= 128


def new_map(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


class Convolution(NamedTuple):
    weight: Tensor  # T [K, 3, 3, C]; of the first layer [K, 3, 3, 3], channels first
    rotated: Tensor  # T [C, 3, 3, K], turned by 180 degrees; empty where ATen makes it
    bias: Tensor  # fp32 [K]

    @property
    def wide(self) -> bool:
        return self.rotated.numel() == 0

    def aten(self, x: Tensor, transposed: bool) -> Tensor:
        weight = self.weight.permute(0, 3, 1, 2)
        ones, zeros = [1, 1], [0, 0]
        y = torch.ops.aten.convolution(x, weight, None, ones, ones, ones, transposed, zeros, 1)
        return y.contiguous(memory_format=torch.channels_last)


def _parts(C: int, K: int, dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a Convolution."""
    yield (K, 3, 3, C), dtype
    yield (C, 3, 3, K) if C == 3 or by_triton(C, K) else (0,), dtype
    yield (K,), torch.float32


def vgg_pack(weights, layers, algorithm):
    """`vaeops::vgg_pack`: each convolution's parts in bytes, one after another."""
    dtype = map_dtype(algorithm, *weights)
    packed = []
    for weight, bias in zip(weights[::2], weights[1::2]):
        K, C = weight.shape[:2]
        forward = weight if C == 3 else weight.permute(0, 2, 3, 1)
        rotated = weight.flip(2, 3).permute(1, 2, 3, 0)
        for part, (shape, kind) in zip((forward, rotated, bias), _parts(C, K, dtype)):
            flat = part.to(kind).reshape(-1).view(torch.uint8) if 0 not in shape else part.new_empty(0)
            packed.append(torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % ALIGNMENT)))
    return torch.cat(packed).view(torch.float32)


def unpack(packed: Tensor, channels: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Convolution]:
    """Views of `packed`. channels: (C, K) of each convolution."""
    if dtype is torch.float64:
        raise ValueError("the Triton kernels of a trunk take fp32 and bf16; fp64 runs with impl='ref'")
    parts = [(torch.Size(shape), kind) for C, K in channels for shape, kind in _parts(C, K, dtype)]
    sizes = [shape.numel() * kind.itemsize for shape, kind in parts]
    starts = [0, *accumulate(size + -size % ALIGNMENT for size in sizes)]
    flat = packed.view(torch.uint8)
    if starts[-1] != flat.numel():
        raise ValueError(
            f"packed holds {flat.numel()} bytes, these layers take {starts[-1]}: packed by another impl"
        )
    views = [
        flat[at : at + size].view(kind).view(shape) for at, size, (shape, kind) in zip(starts, sizes, parts)
    ]
    return [Convolution(*views[i : i + 3]) for i in range(0, len(views), 3)]


class Trunk:
    """The layers with their weights; `sizes` are of the layers' outputs, (K, h, w)."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], packed: Tensor, layers: Sequence[int],
                 pixels: Sequence[float], algorithm: int) -> None:  # fmt: skip
        if any(K % 8 for K in layers):
            raise ValueError(f"layers must be multiples of 8 or 0 (a pool), got {list(layers)}")
        self.dtype, self.layers, self.pixels = map_dtype(algorithm, x, *weights), layers, pixels
        inputs = [w.shape[1] for w in weights[::2]]
        made = unpack(packed, [*zip(inputs, filter(None, layers))], self.dtype)
        self.first, each = made[0], iter(made)
        self.convolutions = [next(each) if K else None for K in layers]
        every_layer = [2 * layer + 1 for layer in range(len(layers))]
        self.sizes = [shape[1:] for shape in map_shapes(x, layers, every_layer)]
        self.batch = x.shape[0]
        largest = max(torch.Size(size).numel() for size in self.sizes) * self.dtype.itemsize
        self.chunk = max(1, CHUNK_BYTES // largest)

    def chunks(self) -> Iterator[slice]:
        for first in range(0, self.batch, self.chunk):
            yield slice(first, min(first + self.chunk, self.batch))

    def new_map(self, like: Tensor, n: int, layer: int) -> Tensor:
        return new_map(like, (n, *self.sizes[layer]), self.dtype)

    def views(self, saved: Tensor | None) -> list[Tensor | None]:
        """[images, bytes] of each layer: masks or codes; None where nothing is kept."""
        bits = [K * h * w * (1 if out else 2) for out, (K, h, w) in zip(self.layers, self.sizes)]
        if saved is None or not saved.numel():
            return [None] * len(bits)
        images = saved.numel() * 8 // sum(bits)
        parts = saved.split([images * each // 8 for each in bits])
        return [part.view(images, -1) for part in parts]

    def forward(self, x: Tensor, maps: dict[int, Tensor], saved: Sequence[Tensor | None]) -> None:
        """x [n, 3, H, W]; writes the maps of the taps, and masks and codes where there is room for them."""
        n, v, last = len(x), x, len(self.layers) - 1
        for layer, made in enumerate(self.convolutions):
            y, pooled, code = maps.get(2 * layer + 1), None, None
            if made is None:
                if not self.layers[layer - 1]:  # other pools are made with the convolution before them
                    y = self.new_map(x, n, layer) if y is None else y
                    pool.run_finish(v, None, False, (None, None, None, y, saved[layer]))
                    v = y
                continue
            if layer < last and self.convolutions[layer + 1] is None:
                pooled, code = maps.get(2 * layer + 3), saved[layer + 1]
                pooled = self.new_map(x, n, layer + 1) if pooled is None else pooled
            elif layer < last and y is None:
                y = self.new_map(x, n, layer)
            outputs = (maps.get(2 * layer), y, saved[layer], pooled, code)
            if layer == 0:
                conv.run_conv_first(v, self.pixels, made.weight, made.bias, True, outputs)
            elif made.wide:
                pool.run_finish(made.aten(v, False), made.bias, True, outputs)
            else:
                conv.run_conv(v, made.weight, made.bias, True, outputs)
            if pooled is not None:
                v = pooled
            elif y is not None:
                v = y

    def backward(self, grads: dict[int, Tensor], saved: Sequence[Tensor | None], gx: Tensor) -> None:
        """gx [n, 3, H, W] from the gradients at the taps, channels_last and in the maps' dtype."""

        def at_output(layer: int) -> tuple[Tensor | None, ...]:
            mask = saved[layer] if self.layers[layer] else None
            return grads.get(2 * layer + 1), mask, grads.get(2 * layer)

        if not grads:
            gx.zero_()
            return
        n, deepest = len(gx), max(grads) // 2
        g = self.new_map(gx, n, deepest)
        pool.run_restrain(None, None, at_output(deepest), g)
        for layer in range(deepest, 0, -1):
            made, below = self.convolutions[layer], at_output(layer - 1)
            if made is not None and made.wide:
                g = made.aten(g, True)
                if any(t is not None for t in below):
                    pool.run_restrain(g, None, below, g)
                continue
            out = self.new_map(gx, n, layer - 1)
            if made is None:
                pool.run_restrain(g, saved[layer], below, out)
            else:
                conv.run_conv_bwd(g, made.rotated, below, out)
            g = out
        conv.run_conv_first_bwd(g, self.first.rotated, self.pixels[3:], gx)


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def vgg_features_fwd(x, weights, packed, layers, taps, pixels, algorithm, keep):
    """`vaeops::vgg_features_fwd`."""
    trunk = Trunk(x, weights, packed, layers, pixels, algorithm)
    maps = {tap: trunk.new_map(x, len(x), tap // 2) for tap in taps}
    saved = x.new_empty(saved_bytes(x, layers) if keep else 0, dtype=torch.uint8)
    with layout.guard(x), _without_autocast(x):
        for part in trunk.chunks():
            here = {tap: m[part] for tap, m in maps.items()}
            trunk.forward(x[part], here, [v if v is None else v[part] for v in trunk.views(saved)])
    return [*maps.values()], saved


def vgg_features_bwd(grads, x, weights, packed, saved, layers, taps, pixels, algorithm):
    """`vaeops::vgg_features_bwd`."""
    trunk = Trunk(x, weights, packed, layers, pixels, algorithm)
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    like = {"dtype": trunk.dtype, "memory_format": torch.channels_last}
    with layout.guard(x), _without_autocast(x):
        for part in trunk.chunks():
            here = {tap: g[part].to(**like) for tap, g in zip(taps, grads) if g is not None}
            trunk.backward(here, [v if v is None else v[part] for v in trunk.views(saved)], gx[part])
    return gx


def perceptual_fwd(
    x, target, target_maps, weights, packed, lin, layers, taps, pixels, target_pixels, head_tap, head_kind,
    head_weight, mean, algorithm, want_grad,
):  # fmt: skip
    """`vaeops::perceptual_fwd`: of each chunk the target's maps, the image's, the heads and the way back."""
    trunk = Trunk(x, weights, packed, layers, pixels, algorithm)
    of_target = None if target is None else Trunk(target, weights, packed, layers, target_pixels, algorithm)
    lins = iter([t.contiguous() for t in lin])
    heads = [
        (taps[tap], kind, weight, next(lins) if DISTANCES[kind] == "lpips" else None)
        for tap, kind, weight in zip(head_tap, head_kind, head_weight)
    ]
    losses = x.new_empty((len(heads), len(x)), dtype=torch.float32)
    gx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_grad else None
    with layout.guard(x), _without_autocast(x):
        for part in trunk.chunks():
            n = part.stop - part.start
            if of_target is not None:
                theirs = {tap: trunk.new_map(x, n, tap // 2) for tap in taps}
                of_target.forward(target[part], theirs, trunk.views(None))
            else:
                theirs = {tap: m[part] for tap, m in zip(taps, target_maps)}
            ours = {tap: trunk.new_map(x, n, tap // 2) for tap in taps}
            kept = x.new_empty(saved_bytes(x[part], layers) if want_grad else 0, dtype=torch.uint8)
            saved = trunk.views(kept)
            trunk.forward(x[part], ours, saved)
            grads: dict[int, Tensor] = {}
            for (tap, kind, weight, of_channels), out in zip(heads, losses):
                add = tap in grads
                if want_grad and not add:
                    grads[tap] = torch.empty_like(ours[tap])
                distance.run(ours[tap], theirs[tap], of_channels, kind, mean, out=out[part], weight=weight,
                             ga=grads.get(tap), add=add)  # fmt: skip
            if gx is not None:
                trunk.backward(grads, saved, gx[part])
    return losses, gx


def _convolutions(packed: Tensor, weights: Sequence[Tensor], algorithm: int) -> Convolve:
    """Between fp32 maps; a first one takes the normalised image."""
    channels = [(w.shape[1], w.shape[0]) for w in weights[::2]]
    all_made = unpack(packed, channels, map_dtype(algorithm, *weights))

    def convolve(i: int, x: Tensor, transposed: bool) -> Tensor:
        made, (C, K) = all_made[i], channels[i]
        y = new_map(x, (len(x), C if transposed else K, *x.shape[2:]), torch.float32)
        if y.numel() == 0:
            return y
        outputs = (y, None, None, None, None)
        if C == 3 and not transposed:
            conv.run_conv_first(x, PLAIN, made.weight, made.bias, False, outputs)
            return y
        x = x.to(dtype=made.weight.dtype, memory_format=torch.channels_last)
        if C == 3:
            conv.run_conv_first_bwd(x, made.rotated, PLAIN[3:], y)
        elif made.wide:
            pool.run_finish(made.aten(x, transposed), None if transposed else made.bias, False, outputs)
        elif transposed:
            conv.run_conv_bwd(x, made.rotated, NOTHING, y)
        else:
            conv.run_conv(x, made.weight, made.bias, False, outputs)
        return y

    return convolve


def vgg_batchnorm_fwd(x, weights, norms, packed, layers, taps, pixels, eps, algorithm, keep):
    """`vaeops::vgg_batchnorm_fwd`: PyTorch's batch norm between the convolutions above."""
    with layout.guard(x):
        maps, kept, stats = batchnorm_run(normalized(x, pixels, torch.float32),
                                          _convolutions(packed, weights, algorithm), norms, layers, taps,
                                          eps)  # fmt: skip
    return [new_map(m, m.shape, m.dtype).copy_(m) for m in maps], kept if keep else [], stats


def vgg_batchnorm_bwd(grads, x, weights, norms, packed, kept, stats, layers, taps, pixels, eps, algorithm):
    """`vaeops::vgg_batchnorm_bwd`."""
    with layout.guard(x):
        g = batchnorm_run_back(
            grads, _convolutions(packed, weights, algorithm), norms, kept, stats, layers, taps, eps
        )
        return (g * g.new_tensor(pixels[3:]).view(3, 1, 1)).to(x.dtype).contiguous()

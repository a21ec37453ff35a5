"""Perceptual losses on a frozen VGG trunk in plain PyTorch: what each kernel must compute, on any device.

Letters: B images of H x W, maps of h x w, C channels in, K channels out.

layers     the trunk, cut after its last tap: K of a 3x3 convolution (stride 1, padding 1, bias, ReLU), or 0
           for a 2x2 max pool (stride 2, rounding down)
taps       ascending codes: 2 * layer + 1 is a layer's output, 2 * layer a convolution's before its ReLU
weights    [w0, b0, w1, b1, ...] of the convolutions, [K, C, 3, 3] and [K], batch norm folded in
pixels     (mean, mean, mean, rstd, rstd, rstd): (p - mean) * rstd enters the first convolution, which pads
           that with zeros
algorithm  of the convolutions, an index into ALGORITHMS. "bf16" rounds weights, maps and their gradients to
           bf16 and sums in fp32; the other two are ways to the same value.

`features` and `distance` are differentiable PyTorch throughout. The functions named `vgg_*`,
`perceptual_fwd` and `feature_distance_*` mirror the low-level ops. Everything is fp64 where an input is, else
fp32, and so it stays under autocast.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Convolve = Callable[[int, Tensor, bool], Tensor]
ARCHS = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg13": (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    "vgg19": (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4, 0),
}
DISTANCES = ("mse", "l1", "smooth_l1", "lpips", "gram")
ALGORITHMS = ("winograd", "direct", "bf16")
REDUCTIONS = ("none", "mean", "sum")
LPIPS_EPS = 1e-10  # added to a pixel's norm


def tap_codes(arch: str) -> dict[str | int, int | None]:
    """{"conv1_1": 0, "relu1_1": 1, ..., and torchvision's index into `features`: its code}.

    None: a convolution before its batch norm, which folding leaves no trace of.
    """
    codes: dict[str | int, int | None] = {}
    block, place, index = 1, 1, 0
    batch_norm = arch.endswith("_bn")
    for layer, channels in enumerate(ARCHS[arch.removesuffix("_bn")]):
        if channels:
            codes[f"conv{block}_{place}"], codes[f"relu{block}_{place}"] = 2 * layer, 2 * layer + 1
            outputs: tuple = (2 * layer, 2 * layer + 1)
            if batch_norm:
                outputs = (None, *outputs)
            place += 1
        else:
            codes[f"pool{block}"] = 2 * layer + 1
            outputs = (2 * layer + 1,)
            block, place = block + 1, 1
        codes.update(enumerate(outputs, index))
        index += len(outputs)
    return codes


def tap_names(arch: str, codes: Sequence[int]) -> list[str]:
    names = {code: name for name, code in tap_codes(arch).items() if isinstance(name, str)}
    return [names[code] for code in codes]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where a tensor is, else fp32: the dtype of maps, losses and their gradients."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def map_dtype(algorithm: int, *tensors: Tensor) -> torch.dtype:
    """Of the feature maps that an op returns."""
    dtype = compute_dtype(*tensors)
    return torch.bfloat16 if algorithm == 2 and dtype is torch.float32 else dtype


def map_shapes(x: Tensor, layers: Sequence[int], taps: Sequence[int]) -> list[tuple]:
    """[B, K, h, w] of each tap."""
    shapes = []
    (height, width), channels = x.shape[2:], 3
    for layer, out in enumerate(layers):
        height, width = (height, width) if out else (height // 2, width // 2)
        channels = out or channels
        shapes += [(x.shape[0], channels, height, width)] * sum(tap // 2 == layer for tap in taps)
    return shapes


def saved_bytes(x: Tensor, layers: Sequence[int]) -> int:
    """What backward keeps: a bit for each element that went through a ReLU, two for each that left a pool."""
    (height, width), channels, bits = x.shape[2:], 0, 0
    for out in layers:
        height, width = (height, width) if out else (height // 2, width // 2)
        channels = out or channels
        bits += height * width * channels * (1 if out else 2)
    return x.shape[0] * (bits // 8)


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _rounded(x: Tensor, algorithm: int) -> Tensor:
    return x.bfloat16().to(x.dtype) if algorithm == 2 and x.dtype is torch.float32 else x


def normalized(x: Tensor, pixels: Sequence[float], dtype: torch.dtype) -> Tensor:
    mean, rstd = (
        torch.tensor(p, dtype=dtype, device=x.device).view(3, 1, 1) for p in (pixels[:3], pixels[3:])
    )
    return (x.to(dtype) - mean) * rstd


def _run(x: Tensor, weights: Sequence[Tensor], layers: Sequence[int], pixels: Sequence[float],
         algorithm: int) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(before the ReLU, output) of each layer; a pool has its input in the first place."""
    dtype = compute_dtype(x, *weights)
    v, run, at = normalized(x, pixels, dtype), [], 0
    with _without_autocast(x):
        for channels in layers:
            if channels:
                w, b = (t.to(dtype) for t in weights[at : at + 2])
                before = F.conv2d(_rounded(v, algorithm), _rounded(w, algorithm), b, padding=1)
                before = _rounded(before, algorithm)
                v, at = before.relu(), at + 2
            else:
                before, v = v, F.max_pool2d(v, 2)
            run.append((before, v))
    return run


def features(x: Tensor, weights: Sequence[Tensor], layers: Sequence[int], taps: Sequence[int],
             pixels: Sequence[float], algorithm: int = 0) -> list[Tensor]:  # fmt: skip
    """The maps [B, K, h, w] at the taps; differentiable in x."""
    run = _run(x, weights, layers, pixels, algorithm)
    return [run[tap // 2][tap % 2] for tap in taps]


def _unpool(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of max_pool2d(x, 2): to the first of equals in each window, to the last NaN."""
    index = F.max_pool2d(x, 2, return_indices=True)[1]
    height, width = x.shape[2:]
    edge = (0, width - 2 * g.shape[3], 0, height - 2 * g.shape[2])
    spread = lambda t: F.pad(t.repeat_interleave(2, 2).repeat_interleave(2, 3), edge)  # noqa: E731
    place = torch.arange(height * width, device=x.device).view(height, width)
    return torch.where(spread(index) == place, spread(g), 0)


def _run_back(grads: Sequence[Tensor | None], run: list[tuple[Tensor, Tensor]], weights: Sequence[Tensor],
              layers: Sequence[int], taps: Sequence[int], pixels: Sequence[float],
              algorithm: int) -> Tensor:  # fmt: skip
    """The image's gradient from those of the maps at the taps (None: none)."""
    dtype = run[-1][1].dtype
    at_tap = {tap: g.to(dtype) for tap, g in zip(taps, grads) if g is not None}
    g, convolution = torch.zeros_like(run[-1][1]), len(weights)
    with _without_autocast(g):
        for layer in reversed(range(len(layers))):
            before = run[layer][0]
            g = g + at_tap.get(2 * layer + 1, 0)
            if not layers[layer]:
                g = _unpool(g, before)
                continue
            g = torch.where(before <= 0, 0, g) + at_tap.get(2 * layer, 0)
            convolution -= 2
            w = _rounded(weights[convolution].to(dtype), algorithm)
            g = F.conv_transpose2d(_rounded(g, algorithm), w, padding=1)
    return g * torch.tensor(pixels[3:], dtype=dtype, device=g.device).view(3, 1, 1)


def _units(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x / (|x| + eps), |x|, where |x| is 0), over channels. A zero pixel's unit and gradient are 0."""
    square = x.square().sum(1, keepdim=True)
    zero = square == 0
    norm = torch.where(zero, 1, square).sqrt()
    return torch.where(zero, 0, x / (norm + LPIPS_EPS)), norm, zero


def _gram(x: Tensor) -> Tensor:
    """F F^T / (C h w), [B, C, C]."""
    flat = x.flatten(2)
    with _without_autocast(x):
        return flat @ flat.transpose(1, 2) / (x.shape[1] * flat.shape[2])


def _lin(lin: Tensor, like: Tensor) -> Tensor:
    return lin.to(like.dtype).view(-1, 1, 1)


def _count(a: Tensor, kind: int, mean: bool, spatial: bool) -> int:
    """What the sum of a kind's terms is divided by."""
    if not mean:
        return 1
    pixels = 1 if spatial else a.shape[2] * a.shape[3]
    return pixels if kind == 3 else a.shape[1] ** 2 if kind == 4 else pixels * a.shape[1]


def distance(a: Tensor, b: Tensor, lin: Tensor | None, kind: int, mean: bool, spatial: bool) -> Tensor:
    """Between maps [B, C, h, w]: [B], or [B, h, w] where spatial; by autograd differentiable in both.

        mse        mean (a - b)^2                                    over C, h, w
        l1         mean |a - b|
        smooth_l1  mean d^2 / 2 where |d| < 1, else |d| - 1/2        d = a - b
        lpips      mean over h, w of sum_c lin_c (u - v)^2           u = a / (|a| + 1e-10), v so of b
        gram       mean (A - B)^2 over C, C                          A = a a^T / (C h w)
    Without `mean` the sum of the same terms. spatial: the pixels apart, for the first four.
    """
    dtype = compute_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if kind == 4:
        terms = (_gram(a) - _gram(b)).square()
    elif kind == 3:
        assert lin is not None
        terms = _lin(lin, a) * (_units(a)[0] - _units(b)[0]).square()
    else:
        d = a - b
        terms = d.square() if kind == 0 else d.abs()
        if kind == 2:
            terms = torch.where(terms < 1, 0.5 * d.square(), terms - 0.5)
    return terms.sum(1 if spatial else (1, 2) if kind == 4 else (1, 2, 3)) / _count(a, kind, mean, spatial)


def distance_bwd(grad: Tensor, a: Tensor, b: Tensor, lin: Tensor | None, kind: int, mean: bool,
                 spatial: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `distance`, in differentiable PyTorch. l1's is 0 where a = b; lpips's at a zero pixel."""
    dtype = compute_dtype(a, b)
    types = a.dtype, b.dtype
    a, b = a.to(dtype), b.to(dtype)
    w = grad.to(dtype) / _count(a, kind, mean, spatial)
    w = w.unsqueeze(1) if spatial else w.view(-1, 1, 1, 1)
    if kind == 4:
        with _without_autocast(a):
            d = 4 * w.view(-1, 1, 1) * (_gram(a) - _gram(b)) / a[0].numel()
            ga, gb = ((s * d @ t.flatten(2)).view_as(t) for s, t in ((1, a), (-1, b)))
    elif kind == 3:
        assert lin is not None
        units_a, units_b = _units(a), _units(b)
        g = 2 * w * _lin(lin, a) * (units_a[0] - units_b[0])
        ga, gb = _through_units(g, a, *units_a), _through_units(-g, b, *units_b)
    else:
        d = a - b
        sign = torch.where(d.isnan(), d, d.sign())
        ga = w * (2 * d if kind == 0 else sign if kind == 1 else d.clamp(-1, 1))
        gb = -ga
    return ga.to(types[0]), gb.to(types[1])


def _through_units(g: Tensor, x: Tensor, unit: Tensor, norm: Tensor, zero: Tensor) -> Tensor:
    """The gradient of x from that of its unit vectors; selected, since at a zero pixel it is infinite."""
    along = (g * x).sum(1, keepdim=True) / norm
    return torch.where(zero, 0, (g - unit * along) / (norm + LPIPS_EPS))


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with the strides of [B, h, w, C] whatever the sizes."""
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def vgg_pack(weights: Sequence[Tensor], layers: Sequence[int], algorithm: int) -> Tensor:
    """An implementation's own form of the weights, made once; the reference needs none."""
    return weights[0].new_empty(0, dtype=torch.float32)


def vgg_features_fwd(
    x, weights, packed, layers, taps, pixels, algorithm, keep
) -> tuple[list[Tensor], Tensor]:
    """The maps at the taps [B, K, h, w], channels_last, and what backward keeps."""
    maps = features(x, weights, layers, taps, pixels, algorithm)
    saved = x.new_zeros(saved_bytes(x, layers) if keep else 0, dtype=torch.uint8)
    return [_channels_last(m, map_dtype(algorithm, x, *weights)) for m in maps], saved


def vgg_features_bwd(grads, x, weights, packed, saved, layers, taps, pixels, algorithm) -> Tensor:
    """The image's gradient [B, 3, H, W], contiguous; forward runs again instead of reading `saved`."""
    run = _run(x, weights, layers, pixels, algorithm)
    gx = _run_back(grads, run, weights, layers, taps, pixels, algorithm)
    return gx.to(x.dtype).contiguous()


def perceptual_fwd(x, target, target_maps, weights, packed, lin, layers, taps, pixels, target_pixels,
                   head_tap, head_kind, head_weight, mean, algorithm,
                   want_grad) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(losses [heads, B] unweighted, gx [B, 3, H, W] = d/dx_b of sum_i weight_i losses[i, b]).

    One of `target`, an image of x's size, and `target_maps`, one map a tap. lin: [K], one a head of "lpips".
    """
    run = _run(x, weights, layers, pixels, algorithm)
    if target is not None:
        target_maps = features(target.to(run[0][0].dtype), weights, layers, taps, target_pixels, algorithm)
    lins, losses = iter(lin), []
    grads: list[Tensor | None] = [None] * len(taps)
    for tap, kind, weight in zip(head_tap, head_kind, head_weight):
        ours, theirs = run[taps[tap] // 2][taps[tap] % 2], target_maps[tap]
        options = (next(lins) if kind == 3 else None, kind, mean, False)
        losses.append(distance(ours, theirs, *options))
        if want_grad:
            w = torch.full_like(losses[-1], weight)
            g, before = distance_bwd(w, ours, theirs, *options)[0], grads[tap]
            grads[tap] = g if before is None else before + g
    if not want_grad:
        return torch.stack(losses), None
    gx = _run_back(grads, run, weights, layers, taps, pixels, algorithm)
    return torch.stack(losses), gx.to(x.dtype).contiguous()


def feature_distance_bwd(grad, a, b, lin, kind, mean, spatial) -> tuple[Tensor, Tensor]:
    """`distance_bwd` with the gradients in the maps' memory formats."""
    grads = distance_bwd(grad, a, b, lin, kind, mean, spatial)
    return torch.empty_like(a).copy_(grads[0]), torch.empty_like(b).copy_(grads[1])


def _batch_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """((y - mean) rstd weight + bias, mean, rstd); PyTorch's own refuses an empty batch."""
    if y.shape[0] == 0:
        return y.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.native_batch_norm(y, weight, bias, None, None, True, 0.0, eps)


def batchnorm_run(x: Tensor, convolve: Convolve, norms: Sequence[Tensor], layers: Sequence[int],
                  taps: Sequence[int], eps: float) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """(maps at the taps, each convolution's output, its mean and rstd [2 x all K]) of the normalised image x.

    A batch norm on the statistics of the batch stands between each convolution and its ReLU. convolve(i, v,
    transposed): convolution i of v, or its input gradient.
    """
    v, maps = x, []
    kept: list[Tensor] = []
    stats: list[Tensor] = []
    with _without_autocast(x):
        for layer, channels in enumerate(layers):
            if channels:
                weight, bias = norms[2 * len(kept) : 2 * len(kept) + 2]
                kept.append(convolve(len(kept), v, False))
                v, *moments = _batch_norm(kept[-1], weight, bias, eps)
                stats += moments
                if 2 * layer in taps:
                    maps.append(v)
                v = v.relu()
            else:
                v = F.max_pool2d(v, 2)
            if 2 * layer + 1 in taps:
                maps.append(v)
    return maps, kept, torch.cat(stats)


def batchnorm_run_back(grads: Sequence[Tensor | None], convolve: Convolve, norms: Sequence[Tensor],
                       kept: Sequence[Tensor], stats: Tensor, layers: Sequence[int], taps: Sequence[int],
                       eps: float) -> Tensor:  # fmt: skip
    """The normalised image's gradient from those at the taps (None: none; one is there)."""
    if kept[0].shape[0] == 0:
        return stats.new_zeros((0, 3, *kept[0].shape[2:]))
    at_tap = {tap: g.to(stats.dtype) for tap, g in zip(taps, grads) if g is not None}
    moments = stats.split([channels for channels in layers if channels for _ in range(2)])
    deepest = max(at_tap) // 2
    at = sum(bool(channels) for channels in layers[: deepest + 1])
    g: Any = 0
    with _without_autocast(stats):
        for layer in range(deepest, -1, -1):
            if not layers[layer]:
                g = g + at_tap.get(2 * layer + 1, 0)
                continue
            at -= 1
            y, weight, bias = kept[at], *norms[2 * at : 2 * at + 2]
            v = _batch_norm(y, weight, bias, eps)[0]
            if layer < deepest and not layers[layer + 1]:
                g = _unpool(g, v.relu())
            g = torch.where(v > 0, g + at_tap.get(2 * layer + 1, 0), 0) + at_tap.get(2 * layer, 0)
            g = torch.ops.aten.native_batch_norm_backward(
                g, y, weight, None, None, *moments[2 * at : 2 * at + 2], True, eps, [True, False, False]
            )[0]
            g = convolve(at, g, True)
    return g


def _convolutions(weights: Sequence[Tensor], algorithm: int, dtype: torch.dtype) -> Convolve:
    def convolve(i: int, v: Tensor, transposed: bool) -> Tensor:
        w, b = (t.to(dtype) for t in weights[2 * i : 2 * i + 2])
        v, w = (_rounded(t, algorithm) for t in (v, w))
        y = F.conv_transpose2d(v, w, padding=1) if transposed else F.conv2d(v, w, b, padding=1)
        return _channels_last(y, dtype)

    return convolve


def vgg_batchnorm_fwd(x, weights, norms, packed, layers, taps, pixels, eps, algorithm,
                      keep) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """`batchnorm_run` of an image. Maps are fp32 (fp64 for fp64) whatever the algorithm, channels_last.

    norms: [weight, bias] of each batch norm, [K]. kept: what backward needs of each convolution's output, in
    the form of the implementation; empty without `keep`.
    """
    dtype = compute_dtype(x, *weights)
    maps, kept, stats = batchnorm_run(normalized(x, pixels, dtype), _convolutions(weights, algorithm, dtype),
                                      [t.to(dtype) for t in norms], layers, taps, eps)  # fmt: skip
    return [_channels_last(m, dtype) for m in maps], kept if keep else [], stats


def vgg_batchnorm_bwd(
    grads, x, weights, norms, packed, kept, stats, layers, taps, pixels, eps, algorithm
) -> Tensor:
    """The image's gradient [B, 3, H, W], contiguous."""
    dtype = compute_dtype(x, *weights)
    g = batchnorm_run_back(grads, _convolutions(weights, algorithm, dtype), [t.to(dtype) for t in norms],
                           kept, stats, layers, taps, eps)  # fmt: skip
    return (g * torch.tensor(pixels[3:], dtype=dtype, device=x.device).view(3, 1, 1)).to(x.dtype).contiguous()

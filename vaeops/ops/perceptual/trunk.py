"""The trunk's low-level ops: its weights packed, its maps, the image's gradient, and one convolution alone.

Specification: vaeops/ref/perceptual.py.
"""

from collections.abc import Callable

import torch

from ...ref import perceptual as ref
from .._library import define, overloads


def triton_kernel(name: str) -> Callable:
    def launch(*args):
        from ...kernels import perceptual

        return getattr(perceptual, name)(*args)

    return launch


def _fake_pack(weights, layers, algorithm):
    # Each implementation has its own form, of its own size.
    return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def channels_last(x, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake_features_fwd(x, weights, packed, layers, taps, pixels, algorithm, keep):
    dtype = ref.map_dtype(algorithm, x, *weights)
    maps = [channels_last(x, shape, dtype) for shape in ref.map_shapes(x, layers, taps)]
    return maps, x.new_empty(ref.saved_bytes(x, layers) if keep else 0, dtype=torch.uint8)


def _fake_features_bwd(grads, x, weights, packed, saved, layers, taps, pixels, algorithm):
    return x.new_empty(x.shape)


def _fake_conv(x, weight, bias, packed, transposed, algorithm):
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])
    return channels_last(x, shape, ref.compute_dtype(x, weight))


define("vgg_pack", "(Tensor[] weights, int[] layers, int algorithm) -> Tensor",
       fake=_fake_pack, ref=ref.vgg_pack, triton=triton_kernel("vgg_pack"), cuda=False)  # fmt: skip
define("vgg_features_fwd",
       "(Tensor x, Tensor[] weights, Tensor packed, int[] layers, int[] taps, float[] pixels, int algorithm,"
       " bool keep) -> (Tensor[], Tensor)",
       fake=_fake_features_fwd, ref=ref.vgg_features_fwd, triton=triton_kernel("vgg_features_fwd"),
       cuda=False)  # fmt: skip
define("vgg_features_bwd",
       "(Tensor?[] grads, Tensor x, Tensor[] weights, Tensor packed, Tensor saved, int[] layers, int[] taps,"
       " float[] pixels, int algorithm) -> Tensor",
       fake=_fake_features_bwd, ref=ref.vgg_features_bwd, triton=triton_kernel("vgg_features_bwd"),
       cuda=False)  # fmt: skip
define("vgg_conv",
       "(Tensor x, Tensor weight, Tensor? bias, Tensor packed, bool transposed, int algorithm) -> Tensor",
       fake=_fake_conv, ref=ref.vgg_conv, triton=triton_kernel("vgg_conv"), cuda=False)  # fmt: skip
PACK, FEATURES_FWD, FEATURES_BWD = (overloads(f"vgg_{n}") for n in ("pack", "features_fwd", "features_bwd"))
CONV = overloads("vgg_conv")

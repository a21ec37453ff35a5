"""The trunk's low-level ops: its weights packed, its maps and the image's gradient, with batch norm folded in
or on the statistics of the batch.

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


def _fake_batchnorm_fwd(x, weights, norms, packed, layers, taps, pixels, eps, algorithm, keep):
    dtype = ref.compute_dtype(x, *weights)
    convolutions = [2 * layer for layer, channels in enumerate(layers) if channels and keep]
    maps, kept = (
        [channels_last(x, shape, dtype) for shape in ref.map_shapes(x, layers, codes)]
        for codes in (taps, convolutions)
    )
    return maps, kept, x.new_empty(2 * sum(layers), dtype=dtype)


def _fake_batchnorm_bwd(grads, x, weights, norms, packed, kept, stats, layers, taps, pixels, eps, algorithm):
    return x.new_empty(x.shape)


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
define("vgg_batchnorm_fwd",
       "(Tensor x, Tensor[] weights, Tensor[] norms, Tensor packed, int[] layers, int[] taps, float[] pixels,"
       " float eps, int algorithm, bool keep) -> (Tensor[], Tensor[], Tensor)",
       fake=_fake_batchnorm_fwd, ref=ref.vgg_batchnorm_fwd, triton=triton_kernel("vgg_batchnorm_fwd"),
       cuda=False)  # fmt: skip
define("vgg_batchnorm_bwd",
       "(Tensor?[] grads, Tensor x, Tensor[] weights, Tensor[] norms, Tensor packed, Tensor[] kept,"
       " Tensor stats, int[] layers, int[] taps, float[] pixels, float eps, int algorithm) -> Tensor",
       fake=_fake_batchnorm_bwd, ref=ref.vgg_batchnorm_bwd, triton=triton_kernel("vgg_batchnorm_bwd"),
       cuda=False)  # fmt: skip
PACK, FEATURES_FWD, FEATURES_BWD = (overloads(f"vgg_{n}") for n in ("pack", "features_fwd", "features_bwd"))
BATCHNORM_FWD, BATCHNORM_BWD = overloads("vgg_batchnorm_fwd"), overloads("vgg_batchnorm_bwd")

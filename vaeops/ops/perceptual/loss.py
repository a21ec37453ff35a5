"""Perceptual losses and the image gradient in one call. Specification: vaeops/ref/perceptual.py."""

from ...ref import perceptual as ref
from .._library import define, overloads
from .trunk import triton_kernel


def _fake_fwd(x, target, target_maps, weights, packed, lin, layers, taps, pixels, target_pixels, head_tap,
              head_kind, head_weight, mean, algorithm, want_grad):  # fmt: skip
    losses = x.new_empty((len(head_tap), x.shape[0]), dtype=ref.compute_dtype(x, *weights))
    return losses, x.new_empty(x.shape) if want_grad else None


define("perceptual_fwd",
       "(Tensor x, Tensor? target, Tensor[] target_maps, Tensor[] weights, Tensor packed, Tensor[] lin,"
       " int[] layers, int[] taps, float[] pixels, float[] target_pixels, int[] head_tap, int[] head_kind,"
       " float[] head_weight, bool mean, int algorithm, bool want_grad) -> (Tensor, Tensor)",
       fake=_fake_fwd, ref=ref.perceptual_fwd, triton=triton_kernel("perceptual_fwd"),
       cuda=False)  # fmt: skip
_PERCEPTUAL = overloads("perceptual_fwd")

"""Triton kernels of vector quantization: launchers with the arguments of the low-level ops."""

from .assign import vq_assign as vq_assign, vq_topk as vq_topk

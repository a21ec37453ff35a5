"""Triton kernels of vector quantization: launchers with the arguments of the low-level ops."""

from .assign import vq_assign as vq_assign, vq_topk as vq_topk
from .gather import vq_gather as vq_gather, vq_gather_bwd as vq_gather_bwd
from .segment import vq_segment_sum as vq_segment_sum

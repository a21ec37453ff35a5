"""The vector-quantization family: nearest codes, their lookup, and what training a codebook needs."""

from .assign import vq_assign as vq_assign, vq_topk as vq_topk
from .lookup import vq_lookup as vq_lookup
from .quantize import VQOutput as VQOutput, vector_quantize as vector_quantize

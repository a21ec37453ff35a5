"""`vector_quantize_pytorch.VectorQuantize` and `ResidualVQ` over the fused quantizer."""

from .quantize import LossBreakdown as LossBreakdown, VectorQuantize as VectorQuantize
from .residual import ResidualVQ as ResidualVQ

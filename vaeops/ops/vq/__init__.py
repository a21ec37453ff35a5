"""The vector-quantization family: nearest codes, their lookup, and what training a codebook needs."""

from .assign import vq_assign as vq_assign, vq_topk as vq_topk
from .lookup import vq_lookup as vq_lookup
from .quantize import VQOutput as VQOutput, vector_quantize as vector_quantize
from .residual import residual_vq as residual_vq
from .sample import vq_entropy as vq_entropy, vq_sample as vq_sample
from .scalar import (
    fsq as fsq,
    fsq_decode as fsq_decode,
    lfq as lfq,
    lfq_decode as lfq_decode,
)
from .update import (
    kmeans as kmeans,
    perplexity as perplexity,
    usage as usage,
    vq_ema_ as vq_ema_,
    vq_expire_ as vq_expire_,
)

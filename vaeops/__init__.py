"""Fused kernels for variational autoencoders in PyTorch: on CPU, Triton and CUDA, behind autograd."""

from . import _native

_native.load()

from . import latent as latent, nn as nn, objectives as objectives, ref as ref, rng as rng
from ._info import info as info
from ._native import empty_cache as empty_cache
from .nn.vgg import VGGTrunk as VGGTrunk
from .ops.gaussian import (
    LatentOutput as LatentOutput,
    gaussian_kl as gaussian_kl,
    gaussian_log_prob as gaussian_log_prob,
    gaussian_nll as gaussian_nll,
    reparam_kl as reparam_kl,
    reparam_kl_packed as reparam_kl_packed,
    reparameterize as reparameterize,
)
from .ops.perceptual import (
    TargetCache as TargetCache,
    Term as Term,
    feature_distance as feature_distance,
    perceptual_loss as perceptual_loss,
)
from .ops.recon import ElboOutput as ElboOutput, elbo as elbo, recon_loss as recon_loss
from .ops.vq import (
    VQOutput as VQOutput,
    fsq as fsq,
    fsq_decode as fsq_decode,
    kmeans as kmeans,
    lfq as lfq,
    lfq_decode as lfq_decode,
    perplexity as perplexity,
    residual_vq as residual_vq,
    usage as usage,
    vector_quantize as vector_quantize,
    vq_assign as vq_assign,
    vq_ema_ as vq_ema_,
    vq_entropy as vq_entropy,
    vq_expire_ as vq_expire_,
    vq_lookup as vq_lookup,
    vq_sample as vq_sample,
    vq_topk as vq_topk,
)

__version__ = "0.1.0"

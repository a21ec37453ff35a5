"""Fused kernels for variational autoencoders in PyTorch: on CPU, Triton and CUDA, behind autograd."""

from . import _native

_native.load()

from . import nn as nn, objectives as objectives, ref as ref, rng as rng
from ._info import info as info
from ._native import empty_cache as empty_cache
from .ops.gaussian import (
    LatentOutput as LatentOutput,
    gaussian_kl as gaussian_kl,
    gaussian_log_prob as gaussian_log_prob,
    reparam_kl as reparam_kl,
    reparam_kl_packed as reparam_kl_packed,
    reparameterize as reparameterize,
)

__version__ = "0.1.0"

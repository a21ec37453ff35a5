"""Fused kernels for variational autoencoders: reparameterize + KL, on CPU, Triton and CUDA, behind PyTorch autograd."""

from . import _native

_native.load()

from . import nn as nn
from . import objectives as objectives
from . import ref as ref
from . import rng as rng
from ._info import info as info
from .ops.gaussian import (
    LatentOutput as LatentOutput,
    gaussian_kl as gaussian_kl,
    gaussian_log_prob as gaussian_log_prob,
    reparam_kl as reparam_kl,
    reparam_kl_packed as reparam_kl_packed,
    reparameterize as reparameterize,
)

__version__ = "0.1.0"

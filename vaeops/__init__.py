"""Fused kernels for variational autoencoders: reparameterize + KL, on CPU, Triton and CUDA, behind PyTorch autograd."""

from . import _native

_native.load()

from . import nn as nn  # noqa: E402
from . import objectives as objectives  # noqa: E402
from . import ref as ref  # noqa: E402
from . import rng as rng  # noqa: E402
from ._info import info as info  # noqa: E402
from .ops.gaussian import (  # noqa: E402
    LatentOutput as LatentOutput,
)
from .ops.gaussian import (
    gaussian_kl as gaussian_kl,
)
from .ops.gaussian import (
    gaussian_log_prob as gaussian_log_prob,
)
from .ops.gaussian import (
    reparam_kl as reparam_kl,
)
from .ops.gaussian import (
    reparam_kl_packed as reparam_kl_packed,
)
from .ops.gaussian import (
    reparameterize as reparameterize,
)

__version__ = "0.1.0"

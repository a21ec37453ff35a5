"""The Gaussian family: sample, KL and density of diagonal Gaussians."""

from .log_prob import gaussian_log_prob as gaussian_log_prob, gaussian_nll as gaussian_nll
from .reparam_kl import (
    LatentOutput as LatentOutput,
    gaussian_kl as gaussian_kl,
    reparam_kl as reparam_kl,
    reparam_kl_packed as reparam_kl_packed,
    reparameterize as reparameterize,
)

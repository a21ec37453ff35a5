"""The Gaussian family: sample, KL and density of diagonal Gaussians."""

from .log_prob import gaussian_log_prob as gaussian_log_prob
from .reparam_kl import (
    LatentOutput as LatentOutput,
)
from .reparam_kl import (
    gaussian_kl as gaussian_kl,
)
from .reparam_kl import (
    reparam_kl as reparam_kl,
)
from .reparam_kl import (
    reparam_kl_packed as reparam_kl_packed,
)
from .reparam_kl import (
    reparameterize as reparameterize,
)
